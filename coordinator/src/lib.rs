//! Decides what must be done, in which order, and tells people.
//!
//! Owns: what is in the source ([`discovery`]), when a folder is complete ([`readiness`]), the
//! pinned manifests ([`manifests`]), the order of steps as pure functions ([`sequencing`]), what
//! people ask for ([`requests`]), the ledger ([`ledger`]), what people are told ([`alerts`]), what wakes
//! it ([`triggers`], [`notify`]), and the loop that joins them ([`run`]).
//! Never: reads or writes a row of data, claims a lease, or knows a worker.

pub mod alerts;
pub mod api;
pub mod asking;
pub mod book;
mod carrying_out;
pub mod discovering;
pub mod discovery;
pub mod hooks;
pub mod ledger;
mod lost;
pub mod manifests;
pub mod notice;
pub mod notify;
pub mod pinning;
pub mod policy;
pub mod readiness;
pub mod rebuild;
pub mod requests;
pub mod restoring;
mod results;
pub mod run;
pub mod scribe;
pub mod sequencing;
pub mod standing;
mod tracing_runs;
pub mod triggers;
mod watching;
