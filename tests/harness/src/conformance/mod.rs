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
//!
//! | check | for | claim |
//! |---|---|---|
//! | [`readings`] | all | what is known to be in the image is read, and told by the status of its ranges |
//! | [`broken_images`] | all | an image with broken bytes is refused or read |
//! | [`concurrent_requests`] | writable | every read sees what was written last |
//! | [`power_cuts`] | writable | what was flushed is there, and the image is sound |
//! | [`failed_operations`] | writable | nothing is lost that was reported as done |

mod history;
mod readings;
mod session;
mod suite;

pub use readings::{broken_images, readings};
pub use suite::{concurrent_requests, failed_operations, power_cuts};

use block::{DriverEntry, Graph};
use executor::sim::Image;
use serde_json::{Map, Value};

/// The file that holds the subject's image.
pub const IMAGE: &str = "/simulated/image";

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
    /// An image that was not closed can only be read, until it is repaired.
    pub marks_use: bool,
    /// Makes the objects that the definition refers to.
    pub prepare: fn(&Graph),
    /// Looks at the files after a close, a power cut or a failure: leaks are fine, corruption is
    /// an error.
    pub check: fn(&Image) -> Result<(), String>,
}
