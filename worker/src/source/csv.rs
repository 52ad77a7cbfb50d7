//! CSV: records as they came, and the types that their fields allow.

use std::cell::RefCell;
use std::io::{BufRead, Read};
use std::rc::Rc;
use std::sync::OnceLock;

use alluvium_table::arrow::datatypes::{DataType, TimeUnit};

use crate::typing::has_nanoseconds;

/// What of a CSV file is kept at least, to have a record's bytes.
const WINDOW_BYTES: usize = 1 << 16;

/// Input that keeps what was read lately.
pub(super) struct Watched {
    pub(super) input: Box<dyn BufRead + Send>,
    pub(super) window: Rc<RefCell<Window>>,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.window.borrow_mut().bytes.extend_from_slice(&buffer[..read]);
        Ok(read)
    }
}

/// The last bytes of an input.
#[derive(Default)]
pub(super) struct Window {
    /// Where they begin in the input.
    begin: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// The bytes from `begin` to `end`; what lies before `end` is not needed again.
    pub(super) fn take(&mut self, begin: u64, end: u64, line: &mut Vec<u8>) {
        let at = |place: u64| {
            let at = usize::try_from(place.saturating_sub(self.begin)).unwrap_or(usize::MAX);
            at.min(self.bytes.len())
        };
        let (first, last) = (at(begin), at(end));
        line.clear();
        line.extend_from_slice(&self.bytes[first..last]);
        if last >= WINDOW_BYTES {
            self.bytes.drain(..last);
            self.begin = end;
        }
    }
}

/// Every quote that opens a field is closed, right before a delimiter or the end: a record that was cut
/// off, or quotes that mean themselves, would be read as something else.
pub(super) fn is_well_quoted(line: &[u8], delimiter: u8) -> bool {
    if !line.contains(&b'"') {
        return true;
    }
    let mut bytes = line.trim_ascii_start().iter().copied().peekable();
    let is_end = |byte: u8| byte == delimiter || byte == b'\n' || byte == b'\r';
    while let Some(first) = bytes.next() {
        if first == b'"' {
            loop {
                match bytes.next() {
                    None => return false,
                    Some(b'"') if bytes.peek() == Some(&b'"') => drop(bytes.next()),
                    Some(b'"') => break,
                    Some(_) => {}
                }
            }
            if bytes.peek().is_some_and(|byte| !is_end(*byte)) {
                return false;
            }
            bytes.next();
        } else if !is_end(first) {
            while bytes.next().is_some_and(|byte| !is_end(byte)) {}
        }
    }
    true
}

/// Texts of a column: which types could hold all of them without a loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// Some value was there.
    any: bool,
    not_long: bool,
    not_double: bool,
    not_boolean: bool,
    not_date: bool,
    not_timestamp: bool,
    not_timestamp_ntz: bool,
}

impl Seen {
    pub(super) fn add(&mut self, text: &str) {
        self.any = true;
        // Numbers as people write them: `007` and `+1` are names of something.
        self.not_long |=
            text.parse::<i64>().map(|number| number.to_string()).as_deref() != Ok(text);
        let digits = text.bytes().take_while(|b| !matches!(b, b'e' | b'E'));
        let is_exact = digits.filter(u8::is_ascii_digit).count() <= 15;
        self.not_double |= !(is_exact && is_double(text));
        self.not_boolean |= !matches!(text, "true" | "false" | "TRUE" | "FALSE" | "True" | "False");
        self.not_date |= text.len() != 10 || text.parse::<chrono::NaiveDate>().is_err();
        let may_be_time = is_written_as_time(text) && !has_nanoseconds(text);
        self.not_timestamp |= !may_be_time || chrono::DateTime::parse_from_rfc3339(text).is_err();
        let is_naive = |format| chrono::NaiveDateTime::parse_from_str(text, format).is_ok();
        self.not_timestamp_ntz |=
            !may_be_time || !(is_naive("%Y-%m-%dT%H:%M:%S%.f") || is_naive("%Y-%m-%d %H:%M:%S%.f"));
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.any |= other.any;
        self.not_long |= other.not_long;
        self.not_double |= other.not_double;
        self.not_boolean |= other.not_boolean;
        self.not_date |= other.not_date;
        self.not_timestamp |= other.not_timestamp;
        self.not_timestamp_ntz |= other.not_timestamp_ntz;
    }

    /// The same of a column that identifies rows: different texts are different values.
    pub(super) fn kind_of_key(&self) -> DataType {
        match self.kind() {
            DataType::Float64 | DataType::Boolean => DataType::Utf8,
            kind => kind,
        }
    }

    pub(super) fn kind(&self) -> DataType {
        match self {
            Self { any: false, .. } => DataType::Null,
            Self { not_long: false, .. } => DataType::Int64,
            Self { not_double: false, .. } => DataType::Float64,
            Self { not_boolean: false, .. } => DataType::Boolean,
            Self { not_date: false, .. } => DataType::Date32,
            Self { not_timestamp: false, .. } => {
                DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
            }
            Self { not_timestamp_ntz: false, .. } => {
                DataType::Timestamp(TimeUnit::Microsecond, None)
            }
            _ => DataType::Utf8,
        }
    }
}

/// `2026-01-02?03:04:05…`: who reads it later takes nothing shorter.
fn is_written_as_time(text: &str) -> bool {
    let shape = b"dddd-dd-dd?dd:dd:dd";
    let is_so = |(byte, wanted): (u8, &u8)| match wanted {
        b'd' => byte.is_ascii_digit(),
        b'?' => true,
        other => byte == *other,
    };
    text.len() >= shape.len() && text.bytes().zip(shape).all(is_so)
}

fn is_double(text: &str) -> bool {
    static DOUBLE: OnceLock<Option<regex::Regex>> = OnceLock::new();
    let pattern = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$";
    let regex = DOUBLE.get_or_init(|| regex::Regex::new(pattern).ok());
    regex.as_ref().is_some_and(|regex| regex.is_match(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(values: &[&str]) -> DataType {
        let mut seen = Seen::default();
        values.iter().for_each(|value| seen.add(value));
        seen.kind()
    }

    #[test]
    fn types_are_only_those_that_lose_nothing() {
        use DataType as T;
        assert_eq!(kind(&[]), T::Null);
        assert_eq!(kind(&["0", "-12"]), T::Int64);
        assert_eq!(kind(&["007", "12"]), T::Utf8);
        assert_eq!(kind(&["+1"]), T::Utf8);
        assert_eq!(kind(&["12", "1.5", "1e3"]), T::Float64);
        assert_eq!(kind(&["9223372036854775807"]), T::Int64);
        assert_eq!(kind(&["9223372036854775808"]), T::Utf8);
        assert_eq!(kind(&["0.1234567890123456789"]), T::Utf8);
        assert_eq!(kind(&["true", "False"]), T::Boolean);
        assert_eq!(kind(&["2024-02-29"]), T::Date32);
        assert_eq!(kind(&["2023-02-29"]), T::Utf8);
        assert_eq!(
            kind(&["2024-01-02T03:04:05Z"]),
            T::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
        );
        assert_eq!(kind(&["2024-01-02 03:04:05.25"]), T::Timestamp(TimeUnit::Microsecond, None));
        assert_eq!(kind(&["2024-01-02", "x"]), T::Utf8);
        assert_eq!(kind(&["2024-01-02T03:04:05.1234567Z"]), T::Utf8);
        assert_eq!(kind(&["2024-01-02T03:04:05.123456000", "2024-01-02 3:04:05"]), T::Utf8);
    }
}
