//! Errors with stable codes, classed where they are born.
//!
//! A [`Code`] is a promise: its number never changes its meaning, and `alluvium explain` prints its
//! page. All code above the place of birth asks [`Error::class`]; nobody matches foreign errors.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What follows from an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Tried again by the coordinator, a limited number of times.
    Transient,
    /// Trying again cannot help: the epoch is blocked until a person or a changed folder helps.
    Permanent,
    /// The worker vanished while it held the task.
    Crash,
    /// The process is being stopped: the task is given back and not counted.
    Stopping,
}

macro_rules! codes {
    ($($variant:ident = $code:literal, $class:ident, $title:literal;)*) => {
        /// Every error a person can meet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code {
            $(#[doc = $title] #[serde(rename = $code)] $variant,)*
        }

        impl Code {
            /// All codes, in order.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The stable code, such as `AL-0203`.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $code,)* }
            }

            /// One line that says what happened.
            pub fn title(self) -> &'static str {
                match self { $(Code::$variant => $title,)* }
            }

            /// What follows from it.
            pub fn class(self) -> Class {
                match self { $(Code::$variant => Class::$class,)* }
            }

            /// The page: what happened, what is still safe, what to do.
            pub fn page(self) -> &'static str {
                match self { $(Code::$variant => include_str!(concat!("errors/", $code, ".md")),)* }
            }
        }
    };
}

codes! {
    ConfigInvalid = "AL-0101", Permanent, "The configuration has problems";
    ConfigNotFound = "AL-0102", Permanent, "There is no configuration file";
    StateLocked = "AL-0103", Permanent, "Another alluvium runs on this state";
    UnknownPipeline = "AL-0104", Permanent, "No pipeline has this name";
    UnknownEpoch = "AL-0105", Permanent, "This pipeline knows no such epoch";
    SettingsMismatch = "AL-0106", Permanent, "The table was made with other settings";
    TableNotOurs = "AL-0107", Permanent, "The main table exists and was not made by this pipeline";
    NotPossibleNow = "AL-0108", Permanent, "This cannot be done in the present state";
    SourceUnreadable = "AL-0201", Transient, "The source cannot be listed";
    AmbiguousFolder = "AL-0202", Permanent, "Two folders name the same epoch";
    FolderChanged = "AL-0203", Permanent, "The folder changed after it was pinned";
    EpochNotAFolder = "AL-0204", Permanent, "An epoch's name belongs to something that is not a folder";
    EpochSettled = "AL-0205", Permanent, "The epoch lies at or below the floor";
    ManifestInvalid = "AL-0206", Permanent, "The folder's manifest cannot be used";
    FileUnreadable = "AL-0301", Permanent, "A data file cannot be read";
    KeyColumnMissing = "AL-0302", Permanent, "A key column is missing";
    ColumnTypeMismatch = "AL-0303", Permanent, "A column's type does not fit the table";
    ExpressionInvalid = "AL-0304", Permanent, "An SQL expression of the pipeline cannot be evaluated";
    ReservedColumn = "AL-0305", Permanent, "A column uses a reserved name";
    SequenceColumnMissing = "AL-0306", Permanent, "The sequence_by column is missing";
    ExpectationFailed = "AL-0307", Permanent, "Rows are not as the pipeline expects them";
    DuplicateKey = "AL-0308", Permanent, "A key occurs more than once in an epoch";
    NewColumn = "AL-0309", Permanent, "A folder has a column that the tables do not have";
    RowMalformed = "AL-0310", Permanent, "A row of a text file cannot be read";
    GateClosed = "AL-0311", Permanent, "An epoch is unlike the ones before it";
    RepairUnknown = "AL-0312", Permanent, "A correction does not fit what was read";
    SelectInvalid = "AL-0313", Permanent, "The pipeline's select cannot be carried out";
    StorageUnavailable = "AL-0401", Transient, "Storage did not answer as it should";
    StorageDenied = "AL-0402", Permanent, "Storage refused access";
    StorageFull = "AL-0403", Transient, "Storage is full";
    TableMovedOn = "AL-0404", Transient, "Other writers kept moving the table";
    TableUnreadable = "AL-0405", Permanent, "A table cannot be opened or written by this version";
    MemoryExhausted = "AL-0406", Permanent, "The task needs more memory than it may use";
    LeaseLost = "AL-0407", Transient, "Another worker took the task over";
    StorageUnsafe = "AL-0408", Permanent, "Storage lets two writers win";
    RestoreImpossible = "AL-0409", Permanent, "The table cannot be taken back to that point";
    CountsDisagree = "AL-0410", Permanent, "A step's counts do not agree";
    FileGone = "AL-0411", Transient, "A file of a table is gone";
    QueueFailed = "AL-0501", Transient, "The task queue did not take or give a message";
    MessageUnknown = "AL-0502", Permanent, "A message cannot be understood by this version";
    QueryFailed = "AL-0503", Permanent, "The query cannot be run";
    TaskPoison = "AL-0504", Crash, "The task's worker died too many times";
    Stopping = "AL-0505", Stopping, "The process is being stopped";
    LeasesUnavailable = "AL-0506", Transient, "Redis does not answer";
    CoordinatorUnreachable = "AL-0507", Transient, "The coordinator cannot be reached";
    AlertNotSent = "AL-0601", Transient, "An alert cannot be delivered";
    HookFailed = "AL-0602", Transient, "The hook after a merge failed";
    NotifyRefused = "AL-0603", Permanent, "A notification from storage was refused";
    Internal = "AL-0901", Permanent, "Alluvium has a bug";
}

impl Code {
    /// The code with this text, upper or lower case.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str().eq_ignore_ascii_case(text))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Longer messages are cut: errors travel in messages, and nobody reads more.
const MESSAGE_BYTES_MAX: usize = 2000;

/// An error with its code: what happened, to which thing, and what to type next.
///
/// It travels in results and in the ledger, so it is plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Error {
    /// The stable code.
    pub code: Code,
    /// Names the file, column, row or setting.
    pub message: String,
    /// What the person should do, when the page's general advice can be made concrete.
    pub help: Option<String>,
}

/// A result with our error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with a code and a message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MESSAGE_BYTES_MAX {
            let end = message.floor_char_boundary(MESSAGE_BYTES_MAX);
            message.truncate(end);
            message.push('…');
        }
        Self { code, message, help: None }
    }

    /// A bug of ours.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(Code::Internal, message.to_string())
    }

    /// With concrete advice.
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With what was being done, in front of the message.
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// What follows from it.
    pub fn class(&self) -> Class {
        self.code.class()
    }
}

/// Adds what was being done to an error that passes by.
pub trait Context<T> {
    /// `doing` reads as "cannot …" or as the thing concerned; it is put in front.
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.context(doing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_page_with_its_three_parts() {
        for code in Code::ALL {
            let page = code.page();
            assert!(page.starts_with(&format!("# {code}: {}", code.title())), "{code}: heading");
            for part in ["## What happened", "## What is still safe", "## What to do"] {
                assert!(page.contains(part), "{code}: {part}");
            }
        }
    }

    #[test]
    fn codes_are_unique_and_parse_back() {
        for code in Code::ALL {
            assert_eq!(Code::parse(&code.as_str().to_lowercase()), Some(*code));
        }
        assert_eq!(Code::parse("AL-9999"), None);
    }
}
