//! `select` of a pipeline, as far as it can be judged without a folder: one row in, at most one out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use deltalake::datafusion::error::DataFusionError;
use deltalake::datafusion::prelude::SessionContext;
use deltalake::datafusion::sql::sqlparser::ast::{
    Distinct, Expr, GroupByExpr, Query, Select, SelectItem, SetExpr, Spanned, Statement,
    TableFactor, visit_expressions,
};
use deltalake::datafusion::sql::sqlparser::dialect::GenericDialect;
use deltalake::datafusion::sql::sqlparser::parser::Parser;
use deltalake::datafusion::sql::sqlparser::tokenizer::{
    Span, Token, TokenWithSpan, Tokenizer, Word,
};

/// The relation that `select` reads.
const INCOMING: &str = "incoming";

/// Where a planning error points to, for people.
pub fn place_of(error: &DataFusionError) -> Option<String> {
    let span = error.diagnostic()?.span?;
    Some(format!("line {}, column {}", span.start.line, span.start.column))
}

fn at(place: &impl Spanned) -> String {
    let start = place.span().start;
    match start.line {
        0 => String::new(),
        line => format!(" (line {line}, column {})", start.column),
    }
}

/// What a `select` reads.
#[derive(Debug, PartialEq)]
pub struct Reads {
    /// The relation's name, as it is spelt.
    pub relation: String,
    /// The columns that `* REPLACE` is to make anew.
    pub replaced: Vec<String>,
}

/// Refuses what is not of one row at a time.
///
/// # Errors
/// What is wrong, with line and column.
pub fn check_select(text: &str) -> Result<Reads, String> {
    let parsed = Parser::new(&GenericDialect {}).try_with_sql(text);
    let statements = parsed.and_then(|mut parser| parser.parse_statements());
    let statements = statements.map_err(|e| format!("not SQL: {e}"))?;
    let query = match statements.as_slice() {
        [Statement::Query(query)] => query,
        [] => return Err("write one SELECT … FROM incoming".to_owned()),
        [_, second, ..] => return Err(format!("write one SELECT … FROM incoming{}", at(second))),
        [other] => {
            // Not every statement knows where it stands.
            let place = match at(other) {
                place if place.is_empty() => " (line 1, column 1)".to_owned(),
                place => place,
            };
            return Err(format!("write one SELECT … FROM incoming{place}"));
        }
    };
    check_query(query)?;
    let SetExpr::Select(select) = query.body.as_ref() else {
        return Err(format!("UNION and the like look at more than one row{}", at(query.as_ref())));
    };
    check_clauses(select)?;
    let relation = check_source(select)?;
    let aggregates = SessionContext::new().state();
    let found = visit_expressions(query.as_ref(), |expr: &Expr| {
        let why = match expr {
            Expr::Function(function) if function.over.is_some() => {
                "a window looks at more than one row"
            }
            Expr::Function(function) => {
                let name = function.name.to_string().to_lowercase();
                if aggregates.aggregate_functions().contains_key(&name) {
                    "an aggregate looks at more than one row"
                } else {
                    return ControlFlow::Continue(());
                }
            }
            Expr::Subquery(_) | Expr::InSubquery { .. } | Expr::Exists { .. } => {
                "a subquery looks at more than one row"
            }
            _ => return ControlFlow::Continue(()),
        };
        ControlFlow::Break(format!("{expr}: {why}{}", at(expr)))
    });
    match found {
        ControlFlow::Break(why) => Err(why),
        ControlFlow::Continue(()) => Ok(Reads { relation, replaced: replaced_by(select) }),
    }
}

/// SQL in which a name is always spelt alike: case is no difference.
#[derive(Debug, PartialEq)]
pub struct Spelling {
    /// The SQL; places in the text are where they were.
    pub sql: String,
    /// The relation's name, as it is spelt there.
    pub relation: String,
    /// The columns' names, as they are spelt there.
    pub columns: Vec<String>,
}

/// The SQL, over the relation `incoming` with these columns, in one spelling of each.
///
/// # Errors
/// It is no SQL.
pub fn one_spelling(sql: &str, columns: &[&str]) -> Result<Spelling, String> {
    let tokens = Tokenizer::new(&GenericDialect {}, sql).tokenize_with_location();
    let tokens = tokens.map_err(|e| format!("not SQL: {e}"))?;
    let words = words_of(tokens, columns);
    let mut changed: BTreeMap<(u64, u64), (Span, String)> = BTreeMap::new();
    let mut spelt = Vec::with_capacity(columns.len() + 1);
    for name in columns.iter().chain(&[INCOMING]) {
        let found = words.get(&name.to_lowercase()).map(Vec::as_slice).unwrap_or_default();
        let is_there = found.is_empty() || found.iter().any(|(word, _)| word.value == *name);
        let chosen = if is_there { (*name).to_owned() } else { found[0].0.value.clone() };
        for (word, span) in found.iter().filter(|(word, _)| word.value != chosen) {
            let text = match word.quote_style {
                Some(quote) => {
                    let doubled = chosen.replace(quote, &format!("{quote}{quote}"));
                    format!("{quote}{doubled}{quote}")
                }
                None => chosen.clone(),
            };
            changed.insert((span.start.line, span.start.column), (*span, text));
        }
        spelt.push(chosen);
    }
    let mut lines: Vec<Vec<char>> = sql.split('\n').map(|line| line.chars().collect()).collect();
    // From the end, so that what lies before stays in its place.
    for (span, text) in changed.into_values().rev() {
        let line = usize::try_from(span.start.line).unwrap_or(1).saturating_sub(1);
        let at = |column: u64| usize::try_from(column).unwrap_or(1).saturating_sub(1);
        if let Some(line) = lines.get_mut(line) {
            let (begin, end) = (at(span.start.column), at(span.end.column).min(line.len()));
            line.splice(begin.min(end)..end, text.chars());
        }
    }
    let lines: Vec<String> = lines.into_iter().map(|line| line.into_iter().collect()).collect();
    let relation = spelt.pop().unwrap_or_default();
    Ok(Spelling { sql: lines.join("\n"), relation, columns: spelt })
}

/// Words by their text in lower case, but for names within a value: in `s.Foo` that is of the value `s`.
fn words_of(tokens: Vec<TokenWithSpan>, columns: &[&str]) -> HashMap<String, Vec<(Word, Span)>> {
    let columns: HashSet<String> = columns.iter().map(|name| name.to_lowercase()).collect();
    let mut words: HashMap<String, Vec<(Word, Span)>> = HashMap::new();
    let (mut is_after_period, mut is_in_value) = (false, false);
    for token in tokens {
        match token.token {
            Token::Word(_) if is_after_period && is_in_value => is_after_period = false,
            Token::Word(word) => {
                let lower = word.value.to_lowercase();
                (is_after_period, is_in_value) = (false, columns.contains(&lower));
                words.entry(lower).or_default().push((word, token.span));
            }
            Token::Period => is_after_period = true,
            Token::Whitespace(_) => {}
            _ => (is_after_period, is_in_value) = (false, false),
        }
    }
    words
}

fn check_query(query: &Query) -> Result<(), String> {
    let refused =
        |clause: &str, place: String| Err(format!("{clause} looks at more than one row{place}"));
    if let Some(with) = &query.with {
        return refused("WITH", at(with));
    }
    if let Some(order) = &query.order_by {
        return refused("ORDER BY", at(order));
    }
    if let Some(limit) = &query.limit_clause {
        return refused("LIMIT", at(limit));
    }
    if query.fetch.is_some() {
        return refused("FETCH", at(query));
    }
    Ok(())
}

fn check_clauses(select: &Select) -> Result<(), String> {
    let is_grouped = match &select.group_by {
        GroupByExpr::All(_) => true,
        GroupByExpr::Expressions(by, _) => !by.is_empty(),
    };
    let is_distinct = match &select.distinct {
        Some(Distinct::All) | None => false,
        Some(_) => true,
    };
    let clause = [
        (is_distinct, "DISTINCT"),
        (select.top.is_some(), "TOP"),
        (is_grouped, "GROUP BY"),
        (select.having.is_some(), "HAVING"),
        (select.qualify.is_some(), "QUALIFY"),
        (!select.named_window.is_empty(), "WINDOW"),
    ];
    match clause.iter().find(|(is_there, _)| *is_there) {
        Some((_, clause)) => Err(format!("{clause} looks at more than one row{}", at(select))),
        None => Ok(()),
    }
}

fn replaced_by(select: &Select) -> Vec<String> {
    let options = select.projection.iter().filter_map(|item| match item {
        SelectItem::Wildcard(options) | SelectItem::QualifiedWildcard(_, options) => {
            options.opt_replace.as_ref()
        }
        _ => None,
    });
    options.flat_map(|r| &r.items).map(|item| item.column_name.value.clone()).collect()
}

fn check_source(select: &Select) -> Result<String, String> {
    let [from] = select.from.as_slice() else {
        return Err(match select.from.get(1) {
            Some(second) => format!("a join looks at more than one row{}", at(&second.relation)),
            None => "it reads nothing: write FROM incoming".to_owned(),
        });
    };
    if let Some(join) = from.joins.first() {
        return Err(format!("a join looks at more than one row{}", at(&join.relation)));
    }
    match &from.relation {
        TableFactor::Table { name, args: None, .. } => {
            let relation = name.to_string();
            match relation.trim_matches('"').eq_ignore_ascii_case(INCOMING) {
                true => Ok(relation.trim_matches('"').to_owned()),
                false => Err(format!(
                    "{name}: there is only the relation incoming{}",
                    at(&from.relation)
                )),
            }
        }
        other => Err(format!("{other}: there is only the relation incoming{}", at(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::{check_select, one_spelling};

    #[test]
    fn a_name_has_one_spelling() {
        let sql = "SELECT Id, id + 1,\n 'id' AS ID -- id\n, \"é\", \"É x\" FROM t WHERE upper(B)";
        let found = one_spelling(sql, &["ID", "é", "b", "c"]).unwrap();
        let wanted =
            "SELECT ID, ID + 1,\n 'id' AS ID -- id\n, \"é\", \"É x\" FROM t WHERE upper(B)";
        assert_eq!((found.sql.as_str(), found.relation.as_str()), (wanted, "incoming"));
        assert_eq!(found.columns, ["ID", "é", "B", "c"]);
        let sql = "SELECT Incoming.FOO, foo, s.Foo, incoming.S . Foo.foo FROM incoming";
        let found = one_spelling(sql, &["foo", "s"]).unwrap();
        let wanted = "SELECT incoming.foo, foo, s.Foo, incoming.s . Foo.foo FROM incoming";
        assert_eq!(found.sql, wanted);
    }

    #[test]
    fn one_row_at_a_time() {
        for good in [
            "SELECT * FROM incoming",
            "SELECT a, b AS c, CAST(d AS BIGINT) AS d FROM incoming WHERE a IS NOT NULL",
            "SELECT i.a FROM incoming AS i",
        ] {
            assert_eq!(check_select(good).unwrap().relation, "incoming", "{good}");
        }
        let reads = check_select("SELECT * REPLACE (1 AS a) FROM incoming").unwrap();
        assert_eq!(reads.replaced, ["a"]);
        for (bad, why) in [
            ("SELECT a FROM incoming JOIN other ON true", "join"),
            ("SELECT a FROM incoming, other", "join"),
            ("SELECT a FROM other", "only the relation incoming"),
            ("SELECT sum(a) FROM incoming", "aggregate"),
            ("SELECT a FROM incoming GROUP BY a", "GROUP BY"),
            ("SELECT row_number() OVER () FROM incoming", "window"),
            ("SELECT DISTINCT a FROM incoming", "DISTINCT"),
            ("SELECT a FROM incoming ORDER BY a", "ORDER BY"),
            ("SELECT a FROM incoming LIMIT 1", "LIMIT"),
            ("SELECT a FROM incoming UNION ALL SELECT a FROM incoming", "UNION"),
            ("SELECT a FROM (SELECT a FROM incoming)", "only the relation incoming"),
            ("SELECT a FROM incoming WHERE a IN (SELECT b FROM incoming)", "subquery"),
            ("WITH x AS (SELECT 1) SELECT a FROM incoming", "WITH"),
            ("DELETE FROM incoming", "one SELECT"),
            ("SELECT a; SELECT b", "one SELECT"),
            ("SELECT a FRM incoming WHERE", "not SQL"),
        ] {
            let found = check_select(bad).unwrap_err();
            assert!(found.contains(why), "{bad}: {found}");
        }
        let found = check_select("SELECT a,\n  sum(b) FROM incoming").unwrap_err();
        assert!(found.contains("line 2, column 3"), "{found}");
    }
}
