//! Epochs: numbers, never text. `EpochFolder` names are parsed here and nowhere else.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One delivery, ordered as a number. It must fit a Delta `long`, the type of raw's `_epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct Epoch(i64);

impl TryFrom<i64> for Epoch {
    type Error = String;

    fn try_from(value: i64) -> Result<Self, String> {
        Self::new(value).ok_or_else(|| format!("{value} is not an epoch: it is negative"))
    }
}

impl From<Epoch> for i64 {
    fn from(epoch: Epoch) -> Self {
        epoch.0
    }
}

impl Epoch {
    /// An epoch from a number; `None` when it is negative.
    pub fn new(value: i64) -> Option<Self> {
        (value >= 0).then_some(Self(value))
    }

    /// The number, as raw's `_epoch` column holds it.
    pub fn value(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl std::str::FromStr for Epoch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match FolderName::parse(text) {
            FolderName::Epoch(epoch) => Ok(epoch),
            FolderName::OutOfRange => Err(format!("{text} is larger than {}", i64::MAX)),
            FolderName::Junk => Err(format!("{text:?} is not an epoch: digits only")),
        }
    }
}

/// What a name below the source prefix is. The raw name stays beside it for paths: `0123` is epoch
/// 123 in the folder `0123`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FolderName {
    /// Digits only: an epoch.
    Epoch(Epoch),
    /// Digits only, but more than a Delta `long` holds.
    OutOfRange,
    /// Everything else (`_temporary`, `backup`, `2024-01-01`): counted, named once, never processed.
    Junk,
}

impl FolderName {
    /// Reads one name without slashes.
    pub fn parse(name: &str) -> Self {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_digit()) {
            return Self::Junk;
        }
        match name.parse::<i64>() {
            Ok(value) => Self::Epoch(Epoch(value)),
            Err(_) => Self::OutOfRange,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_compare_as_numbers() {
        let nine: Epoch = "9".parse().unwrap();
        let ten: Epoch = "10".parse().unwrap();
        assert!(nine < ten);
        assert_eq!("0123".parse::<Epoch>().unwrap(), "123".parse().unwrap());
    }

    #[test]
    fn only_digits_are_epochs() {
        for junk in ["", "-1", "+1", " 1", "1 ", "1e3", "_temporary", "２０２４", "1700000000.5"]
        {
            assert_eq!(FolderName::parse(junk), FolderName::Junk, "{junk:?}");
        }
        assert_eq!(FolderName::parse("9223372036854775808"), FolderName::OutOfRange);
        assert_eq!(FolderName::parse("9223372036854775807"), FolderName::Epoch(Epoch(i64::MAX)));
    }
}
