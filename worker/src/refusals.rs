//! What an epoch's rows must be, beyond having a key: expectations, and keys that occur once.
//!
//! Decided before any table is touched, by reading the folder once more where something is demanded.
//! Afterwards `accepted` is the relation of the rows that are content; the others go to quarantine.

use std::sync::PoisonError;

use alluvium_protocol::pipeline::{Action, Expectation, OnDuplicate};
use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::arrow::array::{AsArray, RecordBatch};
use alluvium_table::arrow::datatypes::{Int64Type, Schema};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::query;
use alluvium_table::schema::find_column;
use alluvium_table::session::{quoted, quoted_list, work_session};
use futures::StreamExt;

use crate::aside::{self, AsideRef, CAME, REASON};
use crate::incoming::Incoming;
use crate::raw::{FILE, ROW};
use crate::rowwise::Condition;

/// Why a row is in quarantine: its key occurs again later in the epoch.
pub const DUPLICATE_KEY: &str = "duplicate_key";
/// Keys that an error names.
const KEYS_SHOWN: usize = 3;

/// What the rows were found to be.
pub struct Judged {
    names: Names,
    /// Rows that are deletes.
    delete_when: Option<Condition>,
    /// Those that the expectations state, in their order.
    conditions: Vec<Condition>,
    /// Rows for which each expectation did not hold.
    pub failed: Vec<(String, u64)>,
    /// Those of them that refuse rows, with the reason that quarantine names.
    refusing: Vec<(String, Condition)>,
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
    let mut judged = Judged::unseen(pipeline, incoming);
    let is_asked = content.delete_when.is_some() || !content.expectations.is_empty();
    let is_asked = is_asked || content.on_duplicate != OnDuplicate::Last;
    let session = work_session(pipeline.sizes.memory_bytes);
    incoming.register(&session, "incoming", &aside::new())?;
    let has_content = incoming.has_content();
    if !has_content || !(is_asked || incoming.may_block()) {
        if !has_content {
            read_through(&session).await?;
        }
        let none = content.expectations.iter().map(|e| (e.name.clone(), 0));
        judged.failed.extend(none);
        return Ok(judged);
    }
    judged.compile(pipeline, incoming).await?;
    judged.make_known(&session);
    judged.look(pipeline, &session, incoming).await?;
    Ok(judged)
}

/// Reads all of `incoming`, for what it refuses alone.
pub async fn read_through(session: &SessionContext) -> Result<()> {
    rows(session, "SELECT count(*) FROM incoming", "read the folder's rows").await.map(drop)
}

impl Judged {
    fn unseen(pipeline: &Pipeline, incoming: &Incoming) -> Self {
        // A folder without rows has perhaps no columns to speak of.
        let is_quarantine = pipeline.content.on_duplicate == OnDuplicate::Quarantine;
        Self {
            names: Names::new(pipeline, incoming.schema()),
            delete_when: None,
            conditions: Vec::new(),
            failed: Vec::new(),
            refusing: Vec::new(),
            only_last: is_quarantine && incoming.has_content(),
        }
    }

    async fn compile(&mut self, pipeline: &Pipeline, incoming: &Incoming) -> Result<()> {
        let compile = async |what: &str, sql: &str| {
            Condition::compile(pipeline, incoming.schema(), what, sql).await
        };
        if let Some(condition) = &pipeline.content.delete_when {
            self.delete_when = Some(compile("delete_when", condition).await?);
        }
        for expectation in &pipeline.content.expectations {
            let what = format!("expect {:?}", expectation.name);
            self.conditions.push(compile(&what, &expectation.sql).await?);
        }
        Ok(())
    }

    /// What some files' rows are, where the folder's were judged: its expectations that refuse rows are
    /// those of which `refuses` gives the reasons.
    pub(crate) async fn of_some(
        pipeline: &Pipeline,
        incoming: &Incoming,
        refuses: &[String],
    ) -> Result<Self> {
        let mut judged = Self::unseen(pipeline, incoming);
        if !incoming.has_content() {
            return Ok(judged);
        }
        judged.compile(pipeline, incoming).await?;
        for (expectation, condition) in pipeline.content.expectations.iter().zip(&judged.conditions)
        {
            let reason = reason_of(expectation);
            if refuses.contains(&reason) {
                judged.refusing.push((reason, condition.clone()));
            }
        }
        Ok(judged)
    }

    /// The reasons for which rows are refused; `None`: it takes the whole folder to know them.
    pub(crate) fn refuses(&self) -> Option<Vec<String>> {
        let reasons = self.refusing.iter().map(|(reason, _)| reason.clone());
        (!self.only_last).then(|| reasons.collect())
    }

    /// Reads the folder for what is demanded of its rows.
    async fn look(
        &mut self,
        pipeline: &Pipeline,
        session: &SessionContext,
        incoming: &Incoming,
    ) -> Result<()> {
        let expectations = &pipeline.content.expectations;
        if !expectations.is_empty() {
            self.failed = self.count_failed(session, expectations).await?;
        } else if incoming.may_block() {
            // Reading alone tells whether every value fits.
            read_through(session).await?;
        }
        for ((expectation, (_, failed)), condition) in
            expectations.iter().zip(&self.failed).zip(&self.conditions)
        {
            if *failed == 0 {
                continue;
            }
            match expectation.action {
                Action::Fail => {
                    let first = first_failing(session, condition).await?;
                    return Err(failed_error(pipeline, incoming, expectation, *failed, &first));
                }
                Action::Quarantine => {
                    self.refusing.push((reason_of(expectation), condition.clone()));
                }
                Action::Warn => {}
            }
        }
        match pipeline.content.on_duplicate {
            OnDuplicate::Fail => self.refuse_duplicates(pipeline, session, incoming).await,
            OnDuplicate::Last | OnDuplicate::Quarantine => Ok(()),
        }
    }

    /// Refused rows go to `aside`. `incoming` reads the folder, and keeps nothing by itself.
    pub async fn set_aside(&self, session: &SessionContext, aside: &AsideRef) -> Result<()> {
        let place = quoted_list([FILE, ROW]);
        self.make_known(session);
        if let Some(refused) = self.refused_when() {
            let reasons: Vec<String> = self
                .refusing
                .iter()
                .map(|(reason, condition)| {
                    format!("WHEN {} THEN {}", fails(condition), text(reason))
                })
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
        self.make_known(session);
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

    /// SQL that is true of a row which is a delete; `None`: none is.
    pub fn delete_when(&self) -> Option<&str> {
        self.delete_when.as_ref().map(Condition::sql)
    }

    fn make_known(&self, session: &SessionContext) {
        for condition in self.conditions.iter().chain(&self.delete_when) {
            condition.register(session);
        }
    }

    /// SQL that is true of rows which are refused; `None`: none is.
    fn refused_when(&self) -> Option<String> {
        let refusing: Vec<String> = self.refusing.iter().map(|(_, c)| fails(c)).collect();
        (!refusing.is_empty()).then(|| refusing.join(" OR "))
    }

    /// The rows that no expectation refuses.
    fn expected(&self) -> String {
        match self.refused_when() {
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

    /// Rows for which each does not hold.
    async fn count_failed(
        &self,
        session: &SessionContext,
        expectations: &[Expectation],
    ) -> Result<Vec<(String, u64)>> {
        let counts =
            self.conditions.iter().map(|e| format!("count(*) FILTER (WHERE {})", fails(e)));
        let counts: Vec<String> = counts.collect();
        let sql = format!("SELECT {} FROM incoming", counts.join(", "));
        let doing = "count rows that are not as expected";
        let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
        let batches = frame.collect().await.map_err(|e| foreign(doing, &e))?;
        let batch = batches.first().ok_or_else(|| Error::internal("a count without a row"))?;
        let count = |at: usize| batch.column(at).as_primitive::<Int64Type>().value(0);
        let named = expectations.iter().enumerate();
        Ok(named.map(|(at, e)| (e.name.clone(), u64::try_from(count(at)).unwrap_or(0))).collect())
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
fn fails(expected: &Condition) -> String {
    format!("({} IS NOT TRUE)", expected.sql())
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

/// Where the first row is for which it does not hold: `; the first is row 3 of a.csv`.
async fn first_failing(session: &SessionContext, expected: &Condition) -> Result<String> {
    let place = quoted_list([FILE, ROW]);
    let fails = fails(expected);
    let sql = format!("SELECT {place} FROM incoming WHERE {fails} ORDER BY {place} LIMIT 1");
    let rows = rows(session, &sql, "find the first row that is not as expected").await?;
    let first = rows.first().map(|row| {
        format!("; the first is row {} of {}", row[ROW], row[FILE].as_str().unwrap_or_default())
    });
    Ok(first.unwrap_or_default())
}

fn failed_error(
    pipeline: &Pipeline,
    incoming: &Incoming,
    expectation: &Expectation,
    failed: u64,
    first: &str,
) -> Error {
    let text = format!(
        "expectation {:?} ({}) does not hold for {failed} of {} rows of {}{first}",
        expectation.name,
        expectation.sql,
        incoming.rows(),
        incoming.folder(),
    );
    let help = format!(
        "deliver the folder again, or change the action of [[pipeline.{}.expect]]; then `alluvium retry`",
        pipeline.id
    );
    Error::new(Code::ExpectationFailed, text).with_help(help)
}
