//! Rows of a query as JSON objects, for people and for our own small readings.

use std::sync::Arc;

use alluvium_protocol::{Code, Error, Result};
use deltalake::arrow::array::{RecordBatch, RecordBatchOptions};
use deltalake::arrow::compute::cast;
use deltalake::arrow::datatypes::{DataType, Field, Schema};
use deltalake::arrow::json::WriterBuilder;
use deltalake::arrow::json::writer::JsonArray;
use deltalake::datafusion::execution::context::{SQLOptions, SessionContext};
use serde_json::Value;

/// Runs a statement and returns its rows, each with all columns.
pub async fn rows(session: &SessionContext, sql: &str) -> Result<Vec<Value>> {
    to_json(&batches(session, sql).await?)
}

/// Runs a statement and returns its batches (at least one, so that the columns are known).
pub async fn batches(session: &SessionContext, sql: &str) -> Result<Vec<RecordBatch>> {
    let failed = |e: &dyn std::fmt::Display| Error::new(Code::QueryFailed, e.to_string());
    // Reading only: tables are written by the rule, never by SQL.
    let reading =
        SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    let frame = session.sql_with_options(sql, reading).await.map_err(|e| failed(&e))?;
    let schema = frame.schema().inner().clone();
    let mut batches = frame.collect().await.map_err(|e| failed(&e))?;
    if batches.is_empty() {
        batches.push(RecordBatch::new_empty(schema));
    }
    Ok(batches)
}

/// Decimals as text: a JSON number would lose digits in most readers.
pub fn with_text_decimals(batch: &RecordBatch) -> Result<RecordBatch> {
    let is_decimal =
        |kind: &DataType| matches!(kind, DataType::Decimal128(..) | DataType::Decimal256(..));
    let kind = |field: &Field| match is_decimal(field.data_type()) {
        true => field.clone().with_data_type(DataType::Utf8),
        false => field.clone(),
    };
    let schema = batch.schema();
    let fields: Vec<Field> = schema.fields().iter().map(|field| kind(field)).collect();
    let columns = batch
        .columns()
        .iter()
        .zip(&fields)
        .map(|(column, field)| match is_decimal(column.data_type()) {
            true => cast(column, field.data_type()),
            false => Ok(Arc::clone(column)),
        })
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(Error::internal)?;
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &rows)
        .map_err(Error::internal)
}

/// Rows as JSON objects.
pub fn to_json(batches: &[RecordBatch]) -> Result<Vec<Value>> {
    let batches = batches.iter().map(with_text_decimals).collect::<Result<Vec<_>>>()?;
    let mut writer =
        WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(Vec::new());
    let rows: Vec<&RecordBatch> = batches.iter().collect();
    writer.write_batches(&rows).map_err(Error::internal)?;
    writer.finish().map_err(Error::internal)?;
    let body = writer.into_inner();
    if body.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&body).map_err(Error::internal)
}

/// Parses an SQL expression over a row, without knowing the row's columns.
pub fn check_expression(text: &str) -> Result<()> {
    use deltalake::datafusion::sql::sqlparser::dialect::GenericDialect;
    use deltalake::datafusion::sql::sqlparser::parser::Parser;
    let invalid =
        |why: String| Error::new(Code::ExpressionInvalid, format!("not an SQL expression: {why}"));
    let parser = Parser::new(&GenericDialect {}).try_with_sql(text);
    let mut parser = parser.map_err(|e| invalid(e.to_string()))?;
    parser.parse_expr().map_err(|e| invalid(e.to_string()))?;
    match parser.peek_token().token {
        deltalake::datafusion::sql::sqlparser::tokenizer::Token::EOF => Ok(()),
        other => Err(invalid(format!("unexpected {other}"))),
    }
}
