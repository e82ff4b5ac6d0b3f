//! How large the file of a new image becomes: what a driver offers to `measure`.
//!
//! Owns: the answer, and [`Graph::measure`]. The options are those of `create`, and no file is
//! touched. Must not know: a concrete format.

use crate::create::{CreateRequest, Target};
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::root::RootHandle;
use serde_json::{Map, Value};

/// Sizes of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Enough for what the source holds.
    pub required: u64,
    /// Enough when all of the disk is written.
    pub fully_allocated: u64,
    /// Enough for copies of the source's persistent bitmaps; `None` when there can be none.
    pub bitmaps: Option<u64>,
}

/// Measures a new image with the options of a request, for the content of a source.
pub type MeasureFn = for<'a> fn(
    &'a mut CreateRequest<'_>,
    Option<&'a RootHandle>,
) -> BoxFuture<'a, Result<Measured>>;

impl Graph {
    /// Measures an image of `driver` with `members` as for [`Graph::create`]. With a source, its
    /// length counts and not `size`.
    ///
    /// # Errors
    /// The driver's; `Unsupported` when it measures nothing.
    pub async fn measure(
        &self,
        driver: &str,
        members: Map<String, Value>,
        source: Option<&RootHandle>,
    ) -> Result<Measured> {
        let measure = self.entry(driver).and_then(|entry| entry.measure);
        let Some(measure) = measure else {
            let message = format!("Block driver '{driver}' does not support size measurement");
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let nowhere = Target::Name(String::new());
        let mut request = CreateRequest::new(self, (driver, nowhere), members)?;
        measure(&mut request, source).await
    }
}
