//! SQL over one row: compiled once, computed a batch at a time, and row by row where a batch fails.
//!
//! The planner's own evaluation has other promises: it may compute what a guard was to keep away
//! (`v <> 0 AND 10 / v > 1`), and whole numbers begin again from below. Here a row's answer is that
//! row's alone, and a number that is too large is an error.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use alluvium_table::arrow::compute::{cast, concat};
use alluvium_table::arrow::datatypes::{
    DataType, Decimal128Type, Field, FieldRef, Schema, SchemaRef, TimeUnit,
};
use alluvium_table::datafusion::common::tree_node::{Transformed, TreeNode};
use alluvium_table::datafusion::common::{DFSchemaRef, ScalarValue};
use alluvium_table::datafusion::error::{DataFusionError, Result as DataFusionResult};
use alluvium_table::datafusion::execution::context::{SessionContext, SessionState};
use alluvium_table::datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use alluvium_table::datafusion::logical_expr::{
    ColumnarValue, Expr, LogicalPlan, Operator, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl,
    Signature, Volatility,
};
use alluvium_table::datafusion::optimizer::simplify_expressions::ExprSimplifier;
use alluvium_table::datafusion::physical_expr::expressions::{BinaryExpr, Literal, NegativeExpr};
use alluvium_table::datafusion::physical_expr::utils::{collect_columns, reassign_expr_columns};
use alluvium_table::datafusion::physical_plan::PhysicalExpr;
use alluvium_table::schema::find_column;
use alluvium_table::select::{Spelling, one_spelling};
use alluvium_table::session::{quoted, quoted_list, work_session};

use crate::raw::{FILE, ROW};
use crate::typing::shown;

/// A planned expression, ready to be computed.
pub(crate) fn compiled(
    state: &SessionState,
    expr: &Expr,
    schema: &DFSchemaRef,
) -> DataFusionResult<Arc<dyn PhysicalExpr>> {
    let context = SimplifyContext::builder().with_schema(Arc::clone(schema)).build();
    let expr = expr.clone().transform_up(|part| Ok(in_microseconds(part)))?.data;
    let expr = ExprSimplifier::new(context.clone()).coerce(expr, schema)?;
    // What is compared was made alike, in nanoseconds; what cannot be otherwise is made so again below.
    let expr = expr.transform_up(|part| Ok(in_microseconds(part)))?.data;
    // Some functions exist only as what they are rewritten to. Nothing else is simplified:
    // constants would be computed without noticing that they grow too large.
    let rewritten = expr.transform_up(|part| match part {
        Expr::ScalarFunction(mut function) => {
            let args = std::mem::take(&mut function.args);
            Ok(match function.func.simplify(args, &context)? {
                ExprSimplifyResult::Simplified(made) => Transformed::yes(made),
                ExprSimplifyResult::Original(args) => {
                    function.args = args;
                    Transformed::no(Expr::ScalarFunction(function))
                }
            })
        }
        other => Ok(Transformed::no(other)),
    })?;
    checked(state.create_physical_expr(rewritten.data, schema)?, schema.as_arrow())
}

/// `TIMESTAMP` in SQL is what it is in the tables: a planner's nanoseconds end in 2262.
fn in_microseconds(part: Expr) -> Transformed<Expr> {
    let micros = |field: &FieldRef| match field.data_type() {
        DataType::Timestamp(TimeUnit::Nanosecond, zone) => {
            let kind = DataType::Timestamp(TimeUnit::Microsecond, zone.clone());
            Some(Arc::new(field.as_ref().clone().with_data_type(kind)))
        }
        _ => None,
    };
    match part {
        Expr::Cast(mut cast) => match micros(&cast.field) {
            Some(field) => {
                cast.field = field;
                Transformed::yes(Expr::Cast(cast))
            }
            None => Transformed::no(Expr::Cast(cast)),
        },
        Expr::TryCast(mut cast) => match micros(&cast.field) {
            Some(field) => {
                cast.field = field;
                Transformed::yes(Expr::TryCast(cast))
            }
            None => Transformed::no(Expr::TryCast(cast)),
        },
        other => Transformed::no(other),
    }
}

/// The expression, failing where whole numbers are too large instead of beginning again from below.
fn checked(
    expr: Arc<dyn PhysicalExpr>,
    schema: &Schema,
) -> DataFusionResult<Arc<dyn PhysicalExpr>> {
    let binary = |left, operator, right| {
        let made = BinaryExpr::new(left, operator, right).with_fail_on_overflow(true);
        Transformed::yes(Arc::new(made) as Arc<dyn PhysicalExpr>)
    };
    let checked = expr.transform_up(|part| {
        if let Some(whole) = part.downcast_ref::<BinaryExpr>() {
            let (left, right) = (Arc::clone(whole.left()), Arc::clone(whole.right()));
            return Ok(binary(left, *whole.op(), right));
        }
        if let Some(negative) = part.downcast_ref::<NegativeExpr>() {
            let kind = negative.arg().data_type(schema)?;
            if kind.is_integer() {
                let zero = Arc::new(Literal::new(ScalarValue::new_zero(&kind)?));
                return Ok(binary(zero, Operator::Minus, Arc::clone(negative.arg())));
            }
        }
        Ok(Transformed::no(part))
    })?;
    Ok(checked.data)
}

/// The expression's value for each row.
///
/// # Errors
/// Text: why it fails for some row; with a single row, for that.
pub(crate) fn evaluated(
    expr: &Arc<dyn PhysicalExpr>,
    batch: &RecordBatch,
) -> Result<ArrayRef, String> {
    let of = |rows: &RecordBatch| {
        let value = || expr.evaluate(rows).and_then(|value| value.into_array(rows.num_rows()));
        // A text of gigabytes ends arrow's builders like this.
        let value = catch_unwind(AssertUnwindSafe(value));
        let value = value.map_err(|_| "its value is too large".to_owned())?;
        let value = value.map_err(|e| e.strip_backtrace())?;
        if let DataType::Decimal128(precision, _) = value.data_type() {
            let digits = value.as_primitive::<Decimal128Type>();
            digits.validate_decimal_precision(*precision).map_err(|e| e.to_string())?;
        }
        Ok(value)
    };
    of(batch).or_else(|why| {
        if batch.num_rows() < 2 {
            return Err(why);
        }
        let rows = (0..batch.num_rows()).map(|row| of(&batch.slice(row, 1)));
        let rows = rows.collect::<Result<Vec<_>, String>>()?;
        let rows: Vec<&dyn Array> = rows.iter().map(AsRef::as_ref).collect();
        concat(&rows).map_err(|e| e.to_string())
    })
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

/// SQL and the columns that it is over, spelt alike.
pub(crate) fn spelt_alike(sql: &str, schema: &Schema) -> Result<(Spelling, SchemaRef), String> {
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let spelling = one_spelling(sql, &names)?;
    let fields = schema.fields().iter().zip(&spelling.columns);
    let fields: Vec<Field> =
        fields.map(|(field, name)| field.as_ref().clone().with_name(name)).collect();
    Ok((spelling, Arc::new(Schema::new(fields))))
}

/// A condition that the configuration states, over the rows of the relation `incoming`.
#[derive(Clone, Debug)]
pub struct Condition {
    function: ScalarUDF,
    call: String,
}

impl Condition {
    /// Compiles `text`, which `what` names for people; `incoming` has the columns `schema`.
    ///
    /// # Errors
    /// `ExpressionInvalid`: not true or false of one row alone, the same each time it is asked.
    pub async fn compile(
        pipeline: &Pipeline,
        schema: &Schema,
        what: &str,
        text: &str,
    ) -> Result<Self> {
        let invalid = |why: String| {
            let help = format!("correct it in [pipeline.{}], then `alluvium retry`", pipeline.id);
            Error::new(Code::ExpressionInvalid, format!("{what} = {text:?}: {why}")).with_help(help)
        };
        let told = |e: DataFusionError| invalid(e.strip_backtrace());
        let session = work_session(pipeline.sizes.memory_bytes);
        let (spelling, input) = spelt_alike(text, schema).map_err(invalid)?;
        let none = session.read_batch(RecordBatch::new_empty(input)).map_err(told)?.into_view();
        let relation = quoted(&spelling.relation);
        session.register_table(relation.as_str(), none).map_err(told)?;
        // On lines of its own: it may end in a comment.
        let frame = session.sql(&format!("SELECT (\n{}\n) FROM {relation}", spelling.sql)).await;
        let frame = frame.map_err(told)?;
        let kind = frame.schema().field(0).data_type();
        if !matches!(kind, DataType::Boolean | DataType::Null) {
            return Err(invalid(format!("it gives a value of type {kind}, not true or false")));
        }
        let plan = frame.logical_plan();
        if plan.expressions().iter().any(|e| changes_with_time(e).unwrap_or(true)) {
            return Err(invalid("it gives another answer each time".to_owned()));
        }
        let LogicalPlan::Projection(projection) = plan else {
            return Err(invalid("it looks at more than one row".to_owned()));
        };
        let [expr] = projection.expr.as_slice() else {
            return Err(invalid("it is more than one expression".to_owned()));
        };
        if !is_row_wise(plan) {
            return Err(invalid("it looks at more than one row".to_owned()));
        }
        let input = projection.input.schema();
        let compiled = compiled(&session.state(), expr, input).map_err(told)?;
        let mut names: BTreeSet<String> =
            collect_columns(&compiled).iter().map(|column| column.name().to_owned()).collect();
        // Where the row is, for an error; and so that there is always an argument.
        names.extend([FILE, ROW].map(str::to_owned));
        let field = |name: &String| {
            input.as_arrow().field_with_name(name).cloned().map_err(Error::internal)
        };
        let columns: Vec<Field> = names.iter().map(field).collect::<Result<_>>()?;
        let columns = Arc::new(Schema::new(columns));
        let expr = reassign_expr_columns(compiled, &columns).map_err(told)?;
        let name = format!("alluvium_{}", alluvium_protocol::pipeline::full_hash(what.as_bytes()));
        let spelt = |name: &String| find_column(schema, name).map(|at| schema.field(at).name());
        let args = quoted_list(names.iter().filter_map(spelt).map(String::as_str));
        let call = format!("{name}({args})");
        let signature = Signature::any(names.len(), Volatility::Immutable);
        let what = format!("{what} = {text:?}");
        let function = ConditionFunction { name, what, signature, columns, expr };
        Ok(Self { function: ScalarUDF::new_from_impl(function), call })
    }

    /// Makes [`Self::sql`] known to the session.
    pub fn register(&self, session: &SessionContext) {
        session.register_udf(self.function.clone());
    }

    /// SQL of its answer.
    pub fn sql(&self) -> &str {
        &self.call
    }
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

/// A condition as a function of the columns that it reads.
#[derive(Debug)]
struct ConditionFunction {
    name: String,
    what: String,
    signature: Signature,
    columns: SchemaRef,
    expr: Arc<dyn PhysicalExpr>,
}

impl PartialEq for ConditionFunction {
    fn eq(&self, other: &Self) -> bool {
        (&self.what, &self.columns) == (&other.what, &other.columns)
    }
}

impl Eq for ConditionFunction {}

impl Hash for ConditionFunction {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.what.hash(state);
    }
}

impl ScalarUDFImpl for ConditionFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _kinds: &[DataType]) -> DataFusionResult<DataType> {
        Ok(DataType::Boolean)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        let columns = args.args.iter().map(|value| value.to_array(args.number_rows));
        let columns = columns.collect::<DataFusionResult<Vec<_>>>()?;
        let batch = RecordBatch::try_new(Arc::clone(&self.columns), columns)?;
        let answers = evaluated(&self.expr, &batch).map_err(|why| {
            DataFusionError::External(Box::new(
                self.failure(&batch).unwrap_or(Error::internal(why)),
            ))
        })?;
        Ok(ColumnarValue::Array(cast(&answers, &DataType::Boolean)?))
    }
}

impl ConditionFunction {
    /// The first row for which it fails, and why.
    fn failure(&self, batch: &RecordBatch) -> Option<Error> {
        (0..batch.num_rows()).find_map(|row| {
            let one = batch.slice(row, 1);
            let why = evaluated(&self.expr, &one).err()?;
            let place = |name| one.column_by_name(name).map(|column| shown(column, 0));
            let (file, row) = (place(FILE)?, place(ROW)?);
            let text = format!("{} fails for row {row} of {file}: {why}", self.what);
            Some(Error::new(Code::ExpressionInvalid, text).with_help(
                "say what holds for every row, with nullif(x, 0) or try_cast(x AS BIGINT); then \
                 `alluvium retry`",
            ))
        })
    }
}
