//! Checks and repairs, in QEMU's order: the mark of an image that was not closed, blocks outside of the
//! file, what the file has behind the last block.

use super::Parallels;
use super::header::{CLOSED, IN_USE_AT};
use crate::blocks::BlockMap;
use crate::bytes::write_bytes;
use block::{CheckOptions, CheckResult, CheckSink, Error, Resize};
use std::sync::atomic::Ordering;

/// What is being found out.
struct Check<'a> {
    image: &'a Parallels,
    map: &'a BlockMap<u32>,
    options: CheckOptions,
    found: CheckResult,
}

/// Checks an image and repairs what `options` say.
pub(super) async fn check(
    image: &Parallels,
    map: &BlockMap<u32>,
    options: CheckOptions,
    sink: &mut dyn CheckSink,
) -> Result<CheckResult, Error> {
    let found = CheckResult {
        total_clusters: u64::from(image.header.entries),
        ..CheckResult::default()
    };
    let mut check = Check {
        image,
        map,
        options,
        found,
    };
    check.mark_of_use(sink).await?;
    let end = check.blocks(sink).await?;
    check.found.image_end_offset = Some(end);
    check.end_of_file(end, sink).await?;
    if options.repair.leaks() {
        let flushed = image.file.node().flush().await;
        flushed.map_err(|errno| Error::io("Could not flush the image", errno))?;
    }
    Ok(check.found)
}

fn verb(repairs: bool) -> &'static str {
    match repairs {
        true => "Repairing",
        false => "ERROR",
    }
}

impl Check<'_> {
    async fn mark_of_use(&mut self, sink: &mut dyn CheckSink) -> Result<(), Error> {
        if !self.image.unclean.load(Ordering::Acquire) {
            return Ok(());
        }
        let repairs = self.options.repair.errors();
        sink.message(&format!("{} image was not closed correctly", verb(repairs)));
        if !repairs {
            self.found.corruptions += 1;
            return Ok(());
        }
        let written = write_bytes(&self.image.file, IN_USE_AT, &CLOSED.to_le_bytes()).await;
        written.map_err(|errno| Error::io("Could not repair the header", errno))?;
        self.image.unclean.store(false, Ordering::Release);
        self.found.corruptions_fixed += 1;
        Ok(())
    }

    /// Looks at all blocks; resolves to where the last one ends.
    async fn blocks(&mut self, sink: &mut dyn CheckSink) -> Result<u64, Error> {
        let file_end = self.image.file.node().length();
        let repairs = self.options.repair.errors();
        let (mut last, mut before) = (0, None);
        for (block, entry) in (0..).zip(self.map.iter()) {
            let Some(offset) = self.image.offset(entry) else {
                before = None;
                continue;
            };
            if offset > file_end {
                sink.message(&format!(
                    "{} cluster {block} is outside image",
                    verb(repairs)
                ));
                if repairs {
                    let cleared = self.image.write_entry(block, 0).await;
                    cleared.map_err(|errno| Error::io("Could not repair the map", errno))?;
                    self.map.set(block, 0);
                    self.found.corruptions_fixed += 1;
                    before = None;
                    continue;
                }
                self.found.corruptions += 1;
            }
            self.found.allocated_clusters += 1;
            if before.is_some_and(|end| end != offset) {
                self.found.fragmented_clusters += 1;
            }
            before = Some(offset.saturating_add(self.image.header.block_bytes()));
            last = last.max(offset);
        }
        Ok(last.saturating_add(self.image.header.block_bytes()))
    }

    /// Behind the last block there is nothing, but for an extension, which is left alone.
    async fn end_of_file(&mut self, end: u64, sink: &mut dyn CheckSink) -> Result<(), Error> {
        let leaked = self.image.file.node().length().saturating_sub(end);
        if leaked == 0 {
            return Ok(());
        }
        let repairs = self.options.repair.leaks() && self.image.header.extension == 0;
        sink.message(&format!(
            "{} space leaked at the end of the image {leaked}",
            verb(repairs)
        ));
        let blocks = leaked.div_ceil(self.image.header.block_bytes());
        if !repairs {
            self.found.leaks += blocks;
            return Ok(());
        }
        let resize = Resize::to(end);
        self.image.file.node().resize(resize).await?;
        self.found.leaks_fixed += blocks;
        Ok(())
    }
}
