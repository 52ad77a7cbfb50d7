//! Foreign errors become codes here, once.
//!
//! The kind is looked for along the whole chain of causes: object stores and DataFusion wrap an
//! operating system's error several times.

use std::error::Error as StdError;
use std::io;

use alluvium_protocol::{Code, Error};
use deltalake::DeltaTableError;
use deltalake::arrow::error::ArrowError;
use deltalake::datafusion::error::DataFusionError;
use deltalake::kernel::transaction::TransactionError;
use deltalake::parquet::errors::ParquetError;

/// What to do about features of a table that this version does not know.
pub(crate) const FEATURES_HELP: &str =
    "let Alluvium write to a table of its own, or drop the feature there";
/// What to do about a file that is gone.
pub(crate) const GONE_HELP: &str =
    "put the file back, or see `alluvium explain AL-0411`: another tool's VACUUM takes such files";

/// A foreign error in our words. `doing` names what was tried, and on which thing.
pub fn foreign(doing: impl std::fmt::Display, cause: &(dyn StdError + 'static)) -> Error {
    // One of ours, on its way through a library.
    if let Some(ours) = causes(cause).find_map(|cause| cause.downcast_ref::<Error>()) {
        return ours.clone();
    }
    let code = code_of(cause);
    let error = Error::new(code, format!("{doing}: {}", one_line(cause)));
    match code {
        Code::StorageFull => error.with_help("free some space, then `alluvium run --once`"),
        Code::StorageDenied => error.with_help("give this user access, then `alluvium run --once`"),
        Code::MemoryExhausted => error.with_help("raise `memory` in [worker]"),
        Code::StorageUnavailable if causes(cause).any(has_long_name) => error.with_help(
            "a value of `partition_by` is in its folder's name: storage takes no longer one; partition by another column",
        ),
        Code::TableUnreadable if causes(cause).any(asks_for_features) => {
            error.with_help(FEATURES_HELP)
        }
        _ => error,
    }
}

/// The same, where a file is read that a table names.
pub(crate) fn of_file(doing: impl std::fmt::Display, cause: &(dyn StdError + 'static)) -> Error {
    let error = foreign(doing, cause);
    match causes(cause).any(is_not_found) {
        true => Error::new(Code::FileGone, error.message).with_help(GONE_HELP),
        false => error,
    }
}

fn has_long_name(cause: &(dyn StdError + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::InvalidFilename)
}

fn is_not_found(cause: &(dyn StdError + 'static)) -> bool {
    let of_io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
    of_io == Some(io::ErrorKind::NotFound)
        || matches!(cause.downcast_ref(), Some(object_store::Error::NotFound { .. }))
}

fn asks_for_features(cause: &(dyn StdError + 'static)) -> bool {
    let failed = cause.downcast_ref::<TransactionError>();
    matches!(
        failed,
        Some(
            TransactionError::UnsupportedTableFeatures(_)
                | TransactionError::TableFeaturesRequired(_)
        )
    )
}

/// Storage itself failed, not the content of what it gave.
pub(crate) fn is_of_storage(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| cause.is::<io::Error>() || cause.is::<object_store::Error>())
}

fn one_line(error: &(dyn StdError + 'static)) -> String {
    let text = without_backtrace(error);
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some(root) = causes(error).last() {
        let root = without_backtrace(root);
        if !line.contains(&root) {
            line = format!("{line}: {root}");
        }
    }
    line
}

/// With `RUST_BACKTRACE` set, DataFusion's texts end in pages of frames.
fn without_backtrace(error: &dyn StdError) -> String {
    let text = error.to_string();
    let end = text.find(DataFusionError::BACK_TRACE_SEP).unwrap_or(text.len());
    text[..end].to_owned()
}

fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let cause = next?;
        next = cause.source();
        Some(cause)
    })
}

fn code_of(error: &(dyn StdError + 'static)) -> Code {
    for cause in causes(error) {
        let code = cause
            .downcast_ref::<io::Error>()
            .and_then(of_io)
            .or_else(|| cause.downcast_ref::<object_store::Error>().and_then(of_store))
            .or_else(|| cause.downcast_ref::<DataFusionError>().and_then(of_datafusion))
            .or_else(|| cause.downcast_ref::<ParquetError>().and_then(of_parquet))
            .or_else(|| cause.downcast_ref::<DeltaTableError>().and_then(of_delta));
        if let Some(code) = code {
            return code;
        }
    }
    // Some wrappers keep only the text of their cause.
    let text = error.to_string();
    if text.contains("No space left on device") {
        return Code::StorageFull;
    }
    if text.contains("Read-only file system") || text.contains("Permission denied") {
        return Code::StorageDenied;
    }
    Code::StorageUnavailable
}

fn of_io(error: &io::Error) -> Option<Code> {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Code::StorageFull),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Some(Code::StorageDenied)
        }
        _ => None,
    }
}

fn of_store(error: &object_store::Error) -> Option<Code> {
    match error {
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => Some(Code::StorageDenied),
        _ => None,
    }
}

fn of_datafusion(error: &DataFusionError) -> Option<Code> {
    match error {
        DataFusionError::ResourcesExhausted(_) => Some(Code::MemoryExhausted),
        // Only `delete_when` computes with people's values.
        DataFusionError::ArrowError(error, _) => match error.as_ref() {
            ArrowError::CastError(_)
            | ArrowError::ParseError(_)
            | ArrowError::ComputeError(_)
            | ArrowError::DivideByZero
            | ArrowError::ArithmeticOverflow(_) => Some(Code::ExpressionInvalid),
            _ => None,
        },
        _ => None,
    }
}

fn of_parquet(error: &ParquetError) -> Option<Code> {
    // `External` carries the store's error; its own cause decides.
    match error {
        ParquetError::External(_) => None,
        _ => Some(Code::FileUnreadable),
    }
}

fn of_delta(error: &DeltaTableError) -> Option<Code> {
    match error {
        DeltaTableError::VersionAlreadyExists(_)
        | DeltaTableError::Transaction {
            source:
                TransactionError::VersionAlreadyExists(_)
                | TransactionError::CommitConflict(_)
                | TransactionError::MaxCommitAttempts(_),
        } => Some(Code::TableMovedOn),
        DeltaTableError::Transaction {
            source:
                TransactionError::UnsupportedTableFeatures(_)
                | TransactionError::TableFeaturesRequired(_)
                | TransactionError::DeltaTableAppendOnly,
        }
        | DeltaTableError::InvalidJsonLog { .. }
        | DeltaTableError::InvalidStatsJson { .. }
        | DeltaTableError::NotATable(_)
        | DeltaTableError::NoSchema
        | DeltaTableError::SchemaMismatch { .. } => Some(Code::TableUnreadable),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_found_below_wrappers() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let store = object_store::Error::Generic { store: "LocalFileSystem", source: full.into() };
        let parquet = ParquetError::External(Box::new(store));
        let datafusion = DataFusionError::ParquetError(Box::new(parquet));
        assert_eq!(foreign("write", &datafusion).code, Code::StorageFull);
    }

    #[test]
    fn bad_parquet_is_not_a_storage_problem() {
        let error = ParquetError::General("invalid magic".to_owned());
        assert_eq!(foreign("read", &error).code, Code::FileUnreadable);
    }
}
