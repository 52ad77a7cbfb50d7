//! `select`: SQL between the folder and raw, compiled once and evaluated batch by batch, so that no row
//! can see another.

use std::sync::Arc;

use alluvium_protocol::pipeline::same_name;
use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::arrow::array::{Array, AsArray, BooleanArray, RecordBatch, RecordBatchOptions};
use alluvium_table::arrow::compute::{cast, prep_null_mask_filter};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::datafusion::error::DataFusionError;
use alluvium_table::datafusion::logical_expr::{Expr, LogicalPlan};
use alluvium_table::datafusion::physical_plan::PhysicalExpr;
use alluvium_table::schema::delta_type;
use alluvium_table::select::{check_select, place_of};
use alluvium_table::session::{quoted, work_session};

use crate::rowwise::{changes_with_time, compiled, evaluated, spelt_alike};

/// A compiled `select`.
pub struct Selection {
    input: SchemaRef,
    output: SchemaRef,
    columns: Vec<Arc<dyn PhysicalExpr>>,
    filter: Option<Arc<dyn PhysicalExpr>>,
}

impl Selection {
    /// Compiles `select` for files with these columns.
    ///
    /// # Errors
    /// `SelectInvalid`, with line and column where these are known.
    pub async fn compile(pipeline: &Pipeline, select: &str, input: &SchemaRef) -> Result<Self> {
        let invalid = |why: String| {
            let help = format!(
                "correct `select` of pipeline.{}, `alluvium config validate`, then `alluvium retry`",
                pipeline.id
            );
            Error::new(Code::SelectInvalid, format!("select: {why}")).with_help(help)
        };
        let (spelling, input) = &spelt_alike(select, input).map_err(invalid)?;
        let select = spelling.sql.as_str();
        let reads = check_select(select).map_err(invalid)?;
        if let Some(name) = reads.replaced.iter().find(|name| input.index_of(name).is_err()) {
            return Err(invalid(format!("REPLACE: there is no column {name:?}")));
        }
        let session = work_session(pipeline.sizes.memory_bytes);
        session.state_ref().write().config_mut().options_mut().sql_parser.collect_spans = true;
        let none = session.read_batch(RecordBatch::new_empty(Arc::clone(input)));
        let none = none.map_err(Error::internal)?.into_view();
        session.register_table(quoted(&reads.relation), none).map_err(Error::internal)?;
        let told = |e: DataFusionError| {
            let place = place_of(&e).map_or_else(String::new, |place| format!(" at {place}"));
            invalid(format!("{}{place}", e.strip_backtrace()))
        };
        let frame = session.sql(select).await.map_err(told)?;
        let LogicalPlan::Projection(projection) = frame.logical_plan() else {
            return Err(invalid("it looks at more than one row".to_owned()));
        };
        let condition = match projection.input.as_ref() {
            LogicalPlan::Filter(filter) => Some(filter.predicate.clone()),
            LogicalPlan::TableScan(_) | LogicalPlan::SubqueryAlias(_) => None,
            _ => return Err(invalid("it looks at more than one row".to_owned())),
        };
        let schema = projection.input.schema();
        let state = session.state();
        let compiled = |expr: &Expr| {
            if changes_with_time(expr).unwrap_or(true) {
                return Err(invalid(format!("{expr} gives another answer each time")));
            }
            compiled(&state, expr, schema).map_err(told)
        };
        let filter = condition.as_ref().map(&compiled).transpose()?;
        let (mut columns, mut fields) = (Vec::new(), Vec::new());
        for (expr, field) in projection.expr.iter().zip(projection.schema.fields()) {
            let column = compiled(expr)?;
            let kind = column.data_type(schema.as_arrow()).map_err(told)?;
            fields.push(Field::new(field.name(), kind, true));
            columns.push(column);
        }
        let output = Arc::new(Schema::new(fields));
        Ok(Self { input: Arc::clone(input), output, columns, filter })
    }

    /// What it is over.
    pub fn input(&self) -> &SchemaRef {
        &self.input
    }

    /// What it gives.
    pub fn output(&self) -> &SchemaRef {
        &self.output
    }

    /// Rows for which it fails, and why the first does; `None`: none.
    pub fn failing(&self, batch: &RecordBatch) -> Option<(BooleanArray, String)> {
        let whole = self.kept(batch).and_then(|keep| match keep {
            // What the filter leaves out is never computed.
            Some(keep) => {
                let kept = alluvium_table::arrow::compute::filter_record_batch(batch, &keep);
                self.project(&kept.map_err(Error::internal)?)
            }
            None => self.project(batch),
        });
        whole.err()?;
        let mut why = None;
        let mut fails = |row: usize| {
            let one = batch.slice(row, 1);
            let done = self.kept(&one).and_then(|keep| match keep {
                Some(keep) if !keep.value(0) => Ok(()),
                _ => self.project(&one).map(drop),
            });
            let failed = done.is_err();
            if let Err(error) = done {
                why.get_or_insert(error.message);
            }
            Some(failed)
        };
        let failed: BooleanArray = (0..batch.num_rows()).map(&mut fails).collect();
        Some((failed, why?))
    }

    /// True for each row that it keeps; `None`: all.
    pub fn kept(&self, batch: &RecordBatch) -> Result<Option<BooleanArray>> {
        let Some(filter) = &self.filter else { return Ok(None) };
        let keep = evaluated(filter, batch).map_err(failed)?;
        let keep = cast(&keep, &DataType::Boolean).map_err(Error::internal)?;
        let keep = keep.as_boolean();
        Ok(Some(match keep.null_count() {
            0 => keep.clone(),
            // NULL is not true.
            _ => prep_null_mask_filter(keep),
        }))
    }

    /// The columns that it makes of each row.
    pub fn project(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let rows = batch.num_rows();
        let columns = self.columns.iter().map(|column| evaluated(column, batch).map_err(failed));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(Arc::clone(&self.output), columns, &options)
            .map_err(Error::internal)
    }
}

fn failed(why: String) -> Error {
    Error::new(Code::SelectInvalid, why)
}

/// What `select` is over: the columns of all files, each with the first type that holds them all.
/// Fields of CSV are text there: what they mean is for `select` to say.
pub fn input_of(schemas: &[SchemaRef], is_csv: bool) -> SchemaRef {
    let mut fields: Vec<Field> = Vec::new();
    for field in schemas.iter().flat_map(|schema| schema.fields()) {
        let held = match is_csv {
            true => DataType::Utf8,
            false => delta_type(field.data_type()).unwrap_or(DataType::Utf8),
        };
        match fields.iter_mut().find(|known| same_name(known.name(), field.name())) {
            None => fields.push(Field::new(field.name(), held, true)),
            Some(known) if alluvium_table::schema::widens_to(known.data_type(), &held) => {
                *known = Field::new(known.name(), held, true);
            }
            Some(_) => {}
        }
    }
    Arc::new(Schema::new(fields))
}
