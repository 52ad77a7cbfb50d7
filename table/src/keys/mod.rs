//! Which rows of a table have one of many keys: the question that every merge asks.
//!
//! Owns: sets of keys ([`KeySet`]), and the scan of a table's key columns for them ([`scan`]). Only key
//! columns are read, row group by row group on all processors; what is held in memory is the set and
//! the row groups at work. Files that have a side index ([`cache`]) are not read at all.

mod bounds;
pub mod cache;
mod contents;
mod encode;
mod fetch;
pub(crate) mod footers;
mod making;
mod pages;
pub mod scan;
mod set;
mod side;
mod spread;

pub use contents::{Content, Contents};
pub use footers::for_arrow_but;
pub use scan::{Found, Scan};
pub use set::KeySet;
pub use spread::readings;
