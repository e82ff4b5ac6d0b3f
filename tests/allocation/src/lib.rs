//! Nothing here: the crate exists for its test, which needs the whole daemon's library and the
//! harness's front-end in one process, with an allocator of its own.
