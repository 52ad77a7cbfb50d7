//! What an epoch's rows must be, beyond having a key: expectations, and keys that occur once.
//!
//! Decided before any table is touched, by reading the folder once more where something is demanded.
//! Afterwards `accepted` is the relation of the rows that are content; the others go to quarantine.

use std::sync::PoisonError;

use alluvium_protocol::pipeline::{Action, Expectation, OnDuplicate};
use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::arrow::array::{AsArray, RecordBatch};
use alluvium_table::arrow::datatypes::{DataType, Int64Type, Schema};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::common::tree_node::TreeNode;
use alluvium_table::datafusion::error::Result as DataFusionResult;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::datafusion::logical_expr::{Expr, LogicalPlan, Volatility};
use alluvium_table::query;
use alluvium_table::schema::find_column;
use alluvium_table::session::{quoted, quoted_list, work_session};
use futures::StreamExt;

use crate::aside::{self, AsideRef, CAME, REASON};
use crate::incoming::{Incoming, first_error};
use crate::raw::{FILE, ROW};

/// Why a row is in quarantine: its key occurs again later in the epoch.
pub const DUPLICATE_KEY: &str = "duplicate_key";
/// Keys that an error names.
const KEYS_SHOWN: usize = 3;

/// What the rows were found to be.
pub struct Judged {
    names: Names,
    /// Rows for which each expectation did not hold.
    pub failed: Vec<(String, u64)>,
    /// SQL that is true of rows which are refused; `None`: none is.
    refused_when: Option<String>,
    /// Earlier rows of a key are refused.
    only_last: bool,
}

/// Columns of the folder in SQL.
struct Names {
    key: Vec<String>,
    /// All of them.
    all: String,
    /// The rule's order within an epoch: the last row decides.
    order: String,
}

impl Names {
    fn new(pipeline: &Pipeline, schema: &Schema) -> Self {
        let spelled = |name: &String| {
            let at = find_column(schema, name);
            at.map_or_else(|| name.clone(), |at| schema.field(at).name().clone())
        };
        let sequence = pipeline.content.sequence_by.as_ref().map(spelled);
        let sequence = sequence.map(|name| format!("{} ASC NULLS FIRST, ", quoted(&name)));
        Self {
            key: pipeline.content.key.iter().map(spelled).collect(),
            all: quoted_list(schema.fields().iter().map(|field| field.name().as_str())),
            order: format!("{}{}", sequence.unwrap_or_default(), quoted_list([FILE, ROW])),
        }
    }

    fn key_list(&self) -> String {
        quoted_list(self.key.iter().map(String::as_str))
    }
}

/// The reason that quarantine names for an expectation.
pub fn reason_of(expectation: &Expectation) -> String {
    format!("expect:{}", expectation.name)
}

/// Looks at every row of `incoming`, which reads the folder.
///
/// # Errors
/// `ExpressionInvalid`: an expression cannot be evaluated. `ExpectationFailed`, `DuplicateKey`: the
/// epoch must not go in.
pub async fn judge(pipeline: &Pipeline, incoming: &Incoming) -> Result<Judged> {
    let content = &pipeline.content;
    let names = Names::new(pipeline, incoming.schema());
    // A folder without rows has perhaps no columns to speak of.
    let only_last = content.on_duplicate == OnDuplicate::Quarantine && incoming.has_content();
    let mut judged = Judged { names, failed: Vec::new(), refused_when: None, only_last };
    let is_asked = content.delete_when.is_some() || !content.expectations.is_empty();
    let is_asked = is_asked || content.on_duplicate != OnDuplicate::Last;
    let session = work_session(pipeline.sizes.memory_bytes);
    let aside = aside::new();
    incoming.register(&session, "incoming", &aside)?;
    let has_content = incoming.has_content();
    if !has_content || !(is_asked || incoming.may_block()) {
        if !has_content {
            read_through(&session, &aside).await?;
        }
        let none = content.expectations.iter().map(|e| (e.name.clone(), 0));
        judged.failed.extend(none);
        return Ok(judged);
    }
    if let Some(condition) = &content.delete_when {
        check_expression(pipeline, &session, "delete_when", condition).await?;
    }
    for expectation in &content.expectations {
        let what = format!("expect {:?}", expectation.name);
        check_expression(pipeline, &session, &what, &expectation.sql).await?;
    }
    let looked = judged.look(pipeline, &session, incoming).await;
    looked.map_err(|error| first_error(&aside, error))?;
    Ok(judged)
}

/// Reads all of `incoming`, for what it refuses alone.
pub async fn read_through(session: &SessionContext, aside: &AsideRef) -> Result<()> {
    let read = rows(session, "SELECT count(*) FROM incoming", "read the folder's rows").await;
    read.map(drop).map_err(|error| first_error(aside, error))
}

impl Judged {
    /// Reads the folder for what is demanded of its rows.
    async fn look(
        &mut self,
        pipeline: &Pipeline,
        session: &SessionContext,
        incoming: &Incoming,
    ) -> Result<()> {
        let expectations = &pipeline.content.expectations;
        if !expectations.is_empty() {
            self.failed = count_failed(session, expectations).await?;
        } else if incoming.may_block() {
            // Reading alone tells whether every value fits.
            rows(session, "SELECT count(*) FROM incoming", "read the folder's rows").await?;
        }
        for (expectation, (_, failed)) in expectations.iter().zip(&self.failed) {
            if *failed > 0 && expectation.action == Action::Fail {
                return Err(failed_error(pipeline, session, incoming, expectation, *failed).await?);
            }
        }
        let refusing: Vec<String> = expectations
            .iter()
            .zip(&self.failed)
            .filter(|(e, (_, failed))| e.action == Action::Quarantine && *failed > 0)
            .map(|(e, _)| fails(e))
            .collect();
        self.refused_when = (!refusing.is_empty()).then(|| refusing.join(" OR "));
        match pipeline.content.on_duplicate {
            OnDuplicate::Fail => self.refuse_duplicates(pipeline, session, incoming).await,
            OnDuplicate::Last | OnDuplicate::Quarantine => Ok(()),
        }
    }

    /// Refused rows go to `aside`. `incoming` reads the folder, and keeps nothing by itself.
    pub async fn set_aside(
        &self,
        pipeline: &Pipeline,
        session: &SessionContext,
        aside: &AsideRef,
    ) -> Result<()> {
        let place = quoted_list([FILE, ROW]);
        if let Some(refused) = &self.refused_when {
            let refusing = pipeline.content.expectations.iter();
            let refusing = refusing.filter(|e| e.action == Action::Quarantine);
            let reasons: Vec<String> = refusing
                .map(|e| format!("WHEN {} THEN {}", fails(e), text(&reason_of(e))))
                .collect();
            let sql = format!(
                "SELECT *, CASE {} END AS {} FROM incoming WHERE {refused} ORDER BY {place}",
                reasons.join(" "),
                quoted(REASON),
            );
            keep(session, &sql, aside).await?;
        }
        if self.only_last {
            let incoming =
                session.table("incoming").await.map_err(|e| foreign("set rows aside", &e))?;
            let has_came = incoming.schema().has_column_with_unqualified_name(CAME);
            let came = if has_came { format!(", {}", quoted(CAME)) } else { String::new() };
            let sql = format!(
                "SELECT {}{came}, '{DUPLICATE_KEY}' AS {} FROM {} WHERE _alluvium_later IS NOT NULL ORDER BY {place}",
                self.names.all,
                quoted(REASON),
                self.ranked(),
            );
            keep(session, &sql, aside).await?;
        }
        Ok(())
    }

    /// Registers the rows of `incoming` that are content, as `accepted`.
    pub async fn register(&self, session: &SessionContext) -> Result<()> {
        let doing = "leave refused rows out";
        let relation = match self.only_last {
            true => {
                format!(
                    "(SELECT {} FROM {} WHERE _alluvium_later IS NULL)",
                    self.names.all,
                    self.ranked()
                )
            }
            false => self.expected(),
        };
        session.deregister_table("accepted").map_err(|e| foreign(doing, &e))?;
        let frame = session.sql(&format!("SELECT * FROM {relation}")).await;
        let frame = frame.map_err(|e| foreign(doing, &e))?;
        session.register_table("accepted", frame.into_view()).map_err(|e| foreign(doing, &e))?;
        Ok(())
    }

    /// The rows that no expectation refuses.
    fn expected(&self) -> String {
        match &self.refused_when {
            Some(refused) => format!("(SELECT * FROM incoming WHERE NOT ({refused}))"),
            None => "incoming".to_owned(),
        }
    }

    /// Those with `_alluvium_later`, which is not NULL where the key comes again.
    fn ranked(&self) -> String {
        format!(
            "(SELECT *, lead({row}) OVER (PARTITION BY {key} ORDER BY {order}) AS _alluvium_later FROM {from})",
            row = quoted(ROW),
            key = self.names.key_list(),
            order = self.names.order,
            from = self.expected(),
        )
    }

    async fn refuse_duplicates(
        &self,
        pipeline: &Pipeline,
        session: &SessionContext,
        incoming: &Incoming,
    ) -> Result<()> {
        let key = self.names.key_list();
        let sql = format!(
            "SELECT count(*) OVER () AS _alluvium_keys, * FROM (SELECT {key}, count(*) AS \
             _alluvium_times, array_to_string(array_sort(array_agg(DISTINCT {file})), ', ') AS \
             _alluvium_files FROM {from} GROUP BY {key} HAVING count(*) > 1) \
             ORDER BY _alluvium_times DESC, {key} LIMIT {KEYS_SHOWN}",
            file = quoted(FILE),
            from = self.expected(),
        );
        let rows = rows(session, &sql, "look for keys that come again").await?;
        let Some(first) = rows.first() else { return Ok(()) };
        let shown: Vec<String> = rows
            .iter()
            .map(|row| {
                let key: Vec<String> =
                    self.names.key.iter().map(|name| row[name].to_string()).collect();
                let files = row["_alluvium_files"].as_str().unwrap_or_default();
                format!("{} {} times in {files}", key.join(", "), row["_alluvium_times"])
            })
            .collect();
        let text = format!(
            "{} key(s) occur more than once in {}: {}",
            first["_alluvium_keys"],
            incoming.folder(),
            shown.join("; ")
        );
        let help =
            format!("deliver the folder again, or set `on_duplicate` of pipeline.{}", pipeline.id);
        Err(Error::new(Code::DuplicateKey, text).with_help(help))
    }
}

/// SQL that is true, and never NULL, of rows for which an expectation does not hold.
fn fails(expectation: &Expectation) -> String {
    // On lines of its own: it may end in a comment.
    format!("((\n{}\n) IS NOT TRUE)", expectation.sql)
}

fn text(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

async fn keep(session: &SessionContext, sql: &str, aside: &AsideRef) -> Result<()> {
    let doing = "set refused rows aside";
    let frame = session.sql(sql).await.map_err(|e| foreign(doing, &e))?;
    let mut stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
    while let Some(batch) = stream.next().await {
        let batch: RecordBatch = batch.map_err(|e| foreign(doing, &e))?;
        let mut shared = aside.lock().unwrap_or_else(PoisonError::into_inner);
        shared.keep(&batch)?;
    }
    Ok(())
}

/// Few rows, as JSON objects.
async fn rows(session: &SessionContext, sql: &str, doing: &str) -> Result<Vec<serde_json::Value>> {
    let frame = session.sql(sql).await.map_err(|e| foreign(doing, &e))?;
    query::to_json(&frame.collect().await.map_err(|e| foreign(doing, &e))?)
}

async fn count_failed(
    session: &SessionContext,
    expectations: &[Expectation],
) -> Result<Vec<(String, u64)>> {
    let counts: Vec<String> = expectations
        .iter()
        .map(|expectation| format!("count(*) FILTER (WHERE {})", fails(expectation)))
        .collect();
    let sql = format!("SELECT {} FROM incoming", counts.join(", "));
    let doing = "count rows that are not as expected";
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    let batches = match frame.collect().await {
        Ok(batches) => batches,
        Err(error) => return Err(culprit(session, expectations, foreign(doing, &error)).await),
    };
    let batch = batches.first().ok_or_else(|| Error::internal("a count without a row"))?;
    let count = |at: usize| batch.column(at).as_primitive::<Int64Type>().value(0);
    let named = expectations.iter().enumerate();
    Ok(named.map(|(at, e)| (e.name.clone(), u64::try_from(count(at)).unwrap_or(0))).collect())
}

/// The error, with the name of the expectation that cannot be asked of every row, if it is one.
async fn culprit(session: &SessionContext, expectations: &[Expectation], error: Error) -> Error {
    for expectation in expectations {
        let sql = format!("SELECT count(*) FILTER (WHERE {}) FROM incoming", fails(expectation));
        let Ok(frame) = session.sql(&sql).await else { continue };
        let Err(why) = frame.collect().await else { continue };
        let text = format!(
            "expectation {:?} ({}) fails for some row: {}",
            expectation.name,
            expectation.sql,
            why.strip_backtrace()
        );
        return Error::new(Code::ExpressionInvalid, text).with_help(
            "say what holds for every row, with nullif(x, 0) or try_cast(x AS BIGINT); then \
             `alluvium retry`",
        );
    }
    error
}

async fn failed_error(
    pipeline: &Pipeline,
    session: &SessionContext,
    incoming: &Incoming,
    expectation: &Expectation,
    failed: u64,
) -> Result<Error> {
    let place = quoted_list([FILE, ROW]);
    let sql = format!(
        "SELECT {place} FROM incoming WHERE {} ORDER BY {place} LIMIT 1",
        fails(expectation)
    );
    let rows = rows(session, &sql, "find the first row that is not as expected").await?;
    let first = rows.first().map(|row| {
        format!("; the first is row {} of {}", row[ROW], row[FILE].as_str().unwrap_or_default())
    });
    let text = format!(
        "expectation {:?} ({}) does not hold for {failed} of {} rows of {}{}",
        expectation.name,
        expectation.sql,
        incoming.rows(),
        incoming.folder(),
        first.unwrap_or_default()
    );
    let help = format!(
        "deliver the folder again, or change the action of [[pipeline.{}.expect]]; then `alluvium retry`",
        pipeline.id
    );
    Ok(Error::new(Code::ExpectationFailed, text).with_help(help))
}

/// An expression is true, false or NULL of one row, and the same each time it is asked.
async fn check_expression(
    pipeline: &Pipeline,
    session: &SessionContext,
    what: &str,
    expression: &str,
) -> Result<()> {
    let invalid = |why: String| {
        let help = format!("correct it in [pipeline.{}], then `alluvium retry`", pipeline.id);
        Error::new(Code::ExpressionInvalid, format!("{what} = {expression:?}: {why}"))
            .with_help(help)
    };
    let sql = format!("SELECT (\n{expression}\n) FROM incoming");
    let frame = session.sql(&sql).await.map_err(|e| invalid(e.strip_backtrace()))?;
    let kind = frame.schema().field(0).data_type();
    if !matches!(kind, DataType::Boolean | DataType::Null) {
        return Err(invalid(format!("it gives a value of type {kind}, not true or false")));
    }
    let plan = frame.logical_plan();
    if plan.expressions().iter().any(|e| changes_with_time(e).unwrap_or(true)) {
        return Err(invalid("it gives another answer each time".to_owned()));
    }
    if !is_row_wise(plan) {
        return Err(invalid("it looks at more than one row".to_owned()));
    }
    Ok(())
}

/// Calls a function such as `random()` or `now()`.
pub(crate) fn changes_with_time(expression: &Expr) -> DataFusionResult<bool> {
    expression.exists(|part| {
        let function = match part {
            Expr::ScalarFunction(function) => function.func.signature().volatility,
            _ => Volatility::Immutable,
        };
        Ok(function != Volatility::Immutable)
    })
}

/// No aggregate, window or subquery: each row is judged alone.
fn is_row_wise(plan: &LogicalPlan) -> bool {
    let is_simple = plan.exists(|node| {
        Ok(!matches!(
            node,
            LogicalPlan::Projection(_) | LogicalPlan::TableScan(_) | LogicalPlan::SubqueryAlias(_)
        ))
    });
    let has_subquery = |expression: &Expr| {
        expression.exists(|part| {
            let is_one =
                matches!(part, Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_));
            Ok(is_one)
        })
    };
    let is_nested = plan.expressions().iter().any(|e| has_subquery(e).unwrap_or(true));
    !is_simple.unwrap_or(true) && !is_nested
}
