//! Errors of the block layer as QMP shows them.

use qmp::Error;

/// The texts are the block layer's, and QEMU has one class for all of its block errors.
pub(crate) fn from_block(error: block::Error) -> Error {
    Error::generic(error.message)
}
