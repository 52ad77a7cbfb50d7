//! What coordinator and worker say to each other.
//!
//! Owns: the nouns ([`epoch`], [`pipeline`], [`task`], [`manifest`]), the epoch's state machine
//! ([`state`]), the error codes ([`error`]), pure decisions ([`retry`]), the seams ([`queue`],
//! [`lease`], [`clock`]) with their in-process twins, and the named crash points ([`crash`]).
//! and what Prometheus is told ([`metrics`]).
//! Never: reads or writes a table or a folder, knows a Delta type, or decides which task comes next.

pub mod clock;
pub mod crash;
pub mod epoch;
pub mod error;
pub mod heartbeat;
pub mod lease;
pub mod manifest;
pub mod marker;
pub mod metrics;
pub mod pipeline;
pub mod queue;
pub mod retry;
pub mod state;
pub mod task;
pub mod trace;

pub use epoch::{Epoch, FolderName};
pub use error::{Class, Code, Error, Result};
pub use pipeline::Pipeline;
