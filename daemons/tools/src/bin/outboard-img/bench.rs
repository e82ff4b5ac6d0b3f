//! `bench`: reads or writes an image as fast as it goes, and tells how long that took.

use crate::{Command, Running};
use block::copy::Window;
use block::error::reason;
use block::{Buffer, Errno, HeapBuffer, RootHandle, WriteFlags};
use serde_json::{Value, json};
use std::time::Instant;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Image, Opening, Tool};
use tools::output;
use tools::size;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "bench",
    usage: "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] \
            [--no-drain] [-o offset] [--pattern=pattern] [-q] [-s buffer_size] [-S step_size] \
            [-t cache] [-w] [-U] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["c", "count"]),
    Opt::value(&["d", "depth"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["flush-interval"]),
    Opt::value(&["i", "aio"]),
    Opt::flag(&["n", "native"]),
    Opt::flag(&["no-drain"]),
    Opt::value(&["o", "offset"]),
    Opt::value(&["pattern"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["s", "buffer-size"]),
    Opt::value(&["S", "step-size"]),
    Opt::value(&["t", "cache"]),
    Opt::flag(&["w", "write"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["allow-dir"]),
];

/// What a flush waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drain {
    /// All requests before it end, then none is in flight but the flush.
    Drained,
    /// `--no-drain`
    Beside,
}

/// Reading or writing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// What is measured.
struct Load {
    direction: Direction,
    requests: u64,
    depth: usize,
    /// Writes between flushes; 0 for none.
    flush_interval: u64,
    drain: Drain,
    offset: u64,
    buffer_bytes: u64,
    step: Option<u64>,
    pattern: u8,
    cache: Cache,
    aio: Option<String>,
}

impl Load {
    fn new() -> Self {
        Self {
            direction: Direction::Read,
            requests: 75_000,
            depth: 64,
            flush_interval: 0,
            drain: Drain::Drained,
            offset: 0,
            buffer_bytes: 4096,
            step: None,
            pattern: 0,
            cache: Cache::default(),
            aio: None,
        }
    }

    fn take(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        match name {
            "c" => self.requests = number(value, "request count")?,
            "d" => self.depth = number(value, "queue depth")? as usize,
            "flush-interval" => self.flush_interval = number(value, "flush interval")?,
            "i" => {
                if !["threads", "native", "io_uring"].contains(&value) {
                    return Err(Failure::message(format!("Invalid aio option: {value}")));
                }
                self.aio = Some(value.to_owned());
            }
            "n" => self.aio = Some("native".to_owned()),
            "no-drain" => self.drain = Drain::Beside,
            "o" => self.offset = size::argument("offset", value)?,
            "pattern" => {
                let byte = plain_number(value).and_then(|number| u8::try_from(number).ok());
                let invalid = || Failure::message("Invalid pattern byte specified");
                self.pattern = byte.ok_or_else(invalid)?;
            }
            "s" => self.buffer_bytes = limited("buffer size", value)?,
            "S" => self.step = Some(limited("step_size", value)?),
            "t" => {
                let invalid = |_| Failure::message("Invalid cache mode");
                self.cache = Cache::parse(value).map_err(invalid)?;
            }
            _ => self.direction = Direction::Write,
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Failure> {
        let message = if self.flush_interval == 0 {
            return Ok(());
        } else if self.direction == Direction::Read {
            "--flush-interval is only available in write tests"
        } else if self.flush_interval < self.depth as u64 {
            "Flush interval can't be smaller than depth"
        } else {
            return Ok(());
        };
        Err(Failure::message(message))
    }

    fn announce(&self) {
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        output::line(&format!(
            "Sending {} {direction} requests, {} bytes each, {} in parallel (starting at offset \
             {}, step size {})",
            self.requests,
            self.buffer_bytes,
            self.depth,
            self.offset,
            self.step()
        ));
        if self.flush_interval != 0 {
            output::line(&format!(
                "Sending flush every {} requests",
                self.flush_interval
            ));
        }
    }

    /// Bytes from one request to the next.
    fn step(&self) -> u64 {
        self.step
            .filter(|step| *step != 0)
            .unwrap_or(self.buffer_bytes)
    }

    /// Opens the image.
    async fn open(&self, tool: &Tool, (common, name): (&Common, String)) -> Result<Image, Failure> {
        let access = match self.direction {
            Direction::Read => Access::Read,
            Direction::Write => Access::Write,
        };
        let opening = Opening {
            sharing: common.sharing,
            cache: self.cache,
            ..Opening::new(access)
        };
        let spec = common.image(name)?;
        let mut options = tool.prepare(&spec, opening)?;
        if let (Some(aio), Some(Value::Object(file))) = (&self.aio, options.get_mut("file")) {
            file.insert("aio".into(), json!(aio));
        }
        tool.open_prepared(&spec, opening, options).await
    }

    /// Sends all requests.
    async fn run(&self, handle: &RootHandle) -> Result<(), Errno> {
        let mut idle: Vec<Buffer> = (0..self.depth.max(1)).map(|_| self.buffer()).collect();
        let (length, step) = (handle.length(), self.step());
        let mut window = Window::new(usize::MAX);
        let mut offset = self.offset;
        for sent in 1..=self.requests {
            while idle.is_empty() {
                idle.extend(window.any().await.transpose()?.flatten());
            }
            let Some(buffer) = idle.pop() else { break };
            let request = self.request(handle, offset, buffer);
            window.push(async { request.await.map(Some) });
            offset = (offset + step) % length;
            if self.flush_interval == 0 || sent % self.flush_interval != 0 {
                continue;
            }
            if self.drain == Drain::Drained {
                while let Some(done) = window.any().await {
                    idle.extend(done?);
                }
            }
            match self.drain {
                Drain::Drained => handle.flush().await?,
                Drain::Beside => {
                    let flush = handle.flush();
                    window.push(async { flush.await.map(|()| None) });
                }
            }
        }
        while let Some(done) = window.any().await {
            done?;
        }
        Ok(())
    }

    fn buffer(&self) -> Buffer {
        let mut memory = HeapBuffer::zeroed(self.buffer_bytes as usize);
        memory.fill(self.pattern);
        memory.into_buffer()
    }

    /// One request; its buffer comes back.
    async fn request(
        &self,
        handle: &RootHandle,
        offset: u64,
        buffer: Buffer,
    ) -> Result<Buffer, Errno> {
        let end = offset.checked_add(self.buffer_bytes);
        if end.is_none_or(|end| end > handle.length()) {
            return Err(Errno::EIO);
        }
        match self.direction {
            Direction::Read => handle.read(offset, buffer.clone()).await?,
            Direction::Write => {
                let flags = WriteFlags {
                    fua: self.cache.write_through,
                    ..WriteFlags::default()
                };
                handle.write(offset, buffer.clone(), flags).await?;
            }
        }
        Ok(buffer)
    }
}

fn plain_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn number(text: &str, what: &str) -> Result<u64, Failure> {
    let number = plain_number(text).filter(|number| *number <= i32::MAX as u64);
    number.ok_or_else(|| Failure::message(format!("Invalid {what} specified")))
}

/// A size that fits 31 bits.
fn limited(what: &str, text: &str) -> Result<u64, Failure> {
    match size::argument(what, text)? {
        bytes if bytes <= i32::MAX as u64 => Ok(bytes),
        _ => Err(Failure::message(format!(
            "Invalid {what} specified. Must be between 0 and {}.",
            i32::MAX
        ))),
    }
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut load) = (Common::default(), Load::new());
    for (name, value) in parsed.options {
        if name == "h" {
            return Ok(crate::help::of(&COMMAND));
        }
        if !common.take(tool, (name, &value))? {
            load.take(name, &value)?;
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    load.check()?;
    let image = load.open(tool, (&common, name)).await?;
    let handle = image.root.attach();
    if handle.length() == 0 {
        return Err(Failure::message("The image is empty"));
    }
    load.announce();
    let begun = Instant::now();
    let done = load.run(&handle).await;
    done.map_err(|errno| Failure::message(format!("Failed request: {}", reason(errno))))?;
    output::line(&format!(
        "Run completed in {:.3} seconds.",
        begun.elapsed().as_secs_f64()
    ));
    drop(handle);
    tool.close_image(image).await?;
    Ok(0)
}
