//! What every driver and format must pass, on the executor's simulated world.
//!
//! ```text
//!   Subject (files, definition) ─► World ─► graph ─► root ─► several writers ─► History
//!                                    │                                            │
//!            reopened, after: clean close · power cut · failed I/O ─► every sector judged
//! ```
//!
//! Owns: the workload, the history of every sector and the judgement. A subject is described by
//! the files it starts with and the options that open it, so the suite knows no format. Each
//! check panics with its seed on a violation, and the same seed does the same again.

mod history;
mod session;
mod suite;

pub use suite::{concurrent_requests, failed_operations, power_cuts};

use block::{DriverEntry, Graph};
use executor::sim::Image;
use serde_json::{Map, Value};

/// What is tested.
pub struct Subject {
    /// For messages.
    pub name: &'static str,
    /// The drivers.
    pub tables: Vec<&'static [DriverEntry]>,
    /// The files that there are at first.
    pub files: Image,
    /// Opens the image, with `node-name` "subject".
    pub definition: Map<String, Value>,
    /// Makes the objects that the definition refers to.
    pub prepare: fn(&Graph),
    /// Looks at the files after a close, a power cut or a failure: leaks are fine, corruption is
    /// an error.
    pub check: fn(&Image) -> Result<(), String>,
}
