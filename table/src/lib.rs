//! Delta tables as Alluvium uses them.
//!
//! Owns: opening and creating tables ([`Table`]), all markers in one pass ([`transactions`]),
//! commits for exactly the snapshot that was checked ([`commit`]), live files and scans of chosen
//! ones ([`LiveFile`], [`scan`]), rows of many keys ([`keys`]), deletion vectors ([`deletion`]), data files ([`mod@write`]), the work memory ([`session`]), and the
//! translation of foreign errors into codes ([`classify`]). The only crate that names `deltalake`;
//! arrow, parquet and DataFusion go out from here, so that their types always fit.
//! Never: knows what an epoch's content means, or decides when something is done.

pub mod classify;
pub mod commit;
mod copy;
pub mod deletion;
mod features;
mod files;
pub mod floats;
pub mod history;
mod kept;
pub mod keys;
mod log_cache;
pub mod pause;
pub mod posted;
pub mod query;
pub mod race;
pub mod rows;
pub mod scan;
pub mod schema;
pub mod select;
pub mod session;
pub mod spool;
pub mod store;
pub mod stretches;
mod table;
pub mod transactions;
pub mod upkeep;
mod uploads;
pub mod width;
pub mod write;

pub use deltalake::kernel::{Action, Add, Remove};
pub use deltalake::{arrow, datafusion, parquet};
pub use files::LiveFile;
pub use table::{CHANGE_FEED, DELETION_VECTORS, Table, TableSpec, bytes_of};
