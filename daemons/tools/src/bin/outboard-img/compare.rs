//! `compare`: do two images read the same.
//!
//! Exit codes: 0 they do, 1 they do not, 2 an image could not be opened, 3 its metadata, 4 its data
//! could not be read. A few pieces are read at a time; what is told is the first difference.

use crate::{Command, Running};
use block::copy::status::{Above, above};
use block::copy::{Window, first_difference, first_nonzero};
use block::error::reason;
use block::{BlockStatus, ByteRange, Errno, HeapBuffer, Root, RootHandle};
use executor::Crew;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::helpers;
use tools::image::{Access, Cache, Common, Image, Opening, Tool};
use tools::progress::{Progress, Show};

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "compare",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] \
            [-U] filename1 filename2",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "a-format"]),
    Opt::value(&["F", "b-format"]),
    Opt::value(&["T", "cache"]),
    Opt::flag(&["p", "progress"]),
    Opt::flag(&["q", "quiet"]),
    Opt::flag(&["s", "strict"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["allow-dir"]),
];

/// Exit codes of failures.
const NOT_OPENED: u8 = 2;
const NO_STATUS: u8 = 3;
const NOT_READ: u8 = 4;

/// Bytes of a piece.
const PIECE_BYTES: u64 = 512 << 10;
/// Pieces in memory at a time.
const PIECES: usize = 12;

/// Whether allocation and length are compared too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strictness {
    /// Only what is read.
    Content,
    /// `-s`
    Strict,
}

/// How a comparison ends early.
enum End {
    /// The images differ: what is said of it.
    Differ(String),
    /// It could not be found out.
    Failed(Failure),
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut second_format) = (Common::default(), None);
    let (mut show, mut strictness) = (Show::OnSignal, Strictness::Content);
    let mut cache = Cache::default();
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "F" => second_format = Some(value),
            "T" => {
                let invalid = |_| Failure::message(format!("Invalid source cache option: {value}"));
                let parsed = Cache::parse(&value).map_err(invalid);
                cache = parsed.map_err(|failure| failure.with_code(NOT_OPENED))?;
            }
            "p" => show = Show::Always,
            "s" => strictness = Strictness::Strict,
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let Ok(names) = <[String; 2]>::try_from(parsed.operands) else {
        return Err(Failure::usage("Expecting two image file names"));
    };
    let show = match common.quiet {
        true => Show::OnSignal,
        false => show,
    };
    let progress = Progress::begin(show);
    let opening = Opening {
        sharing: common.sharing,
        cache,
        ..Opening::new(Access::Read)
    };
    let [first, second] = &names;
    let mut images = Vec::new();
    for (name, format) in [(first, common.format.clone()), (second, second_format)] {
        let one = Common {
            format,
            quiet: common.quiet,
            ..common_of(&common)
        };
        let spec = one.image(name.clone()).map_err(not_opened)?;
        images.push(tool.open(&spec, opening).await.map_err(not_opened)?);
    }
    let ended = {
        let readers = Readers::start(&images);
        let sides = [side(&images[0], first), side(&images[1], second)];
        let told = (&common, &progress);
        compare(&sides, &readers, (strictness, told)).await
    };
    progress.at(1, 1);
    match ended {
        Ok(()) => {
            common.say("Images are identical.");
            Ok(0)
        }
        Err(End::Differ(message)) => {
            common.say(&message);
            Ok(1)
        }
        Err(End::Failed(failure)) => Err(failure),
    }
}

/// What both images share.
fn common_of(common: &Common) -> Common {
    Common {
        format: None,
        notation: common.notation,
        sharing: common.sharing,
        quiet: common.quiet,
    }
}

fn not_opened(failure: Failure) -> Failure {
    match failure {
        Failure::Silent(_) => Failure::Silent(NOT_OPENED),
        other => other.with_code(NOT_OPENED),
    }
}

/// One of the images.
struct Side<'n> {
    handle: RootHandle,
    name: &'n str,
    length: u64,
    /// What was found out last, and where it begins.
    last: Cell<Option<(u64, Known)>>,
}

fn side<'n>(image: &Image, name: &'n str) -> Side<'n> {
    let handle = image.root.attach();
    Side {
        length: handle.length(),
        handle,
        name,
        last: Cell::new(None),
    }
}

/// What is known of a range of one image.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Known {
    length: u64,
    status: BlockStatus,
}

impl Known {
    fn is_allocated(&self) -> bool {
        self.status.allocated
    }

    /// What strict comparison looks at: `at_end` whether it reaches the end of its image.
    fn kind(&self, at_end: bool) -> impl PartialEq + use<> {
        let status = BlockStatus {
            offset: self.status.offset.map(|_| 0),
            ..self.status
        };
        (status, at_end)
    }
}

impl Side<'_> {
    /// What is known of the rest of the image, asked for once in each extent: where an extent ends
    /// may take long to find out.
    async fn known(&self, offset: u64) -> Result<Known, End> {
        if let Some((start, known)) = self.last.get()
            && let Some(passed) = offset.checked_sub(start)
            && passed < known.length
        {
            let length = known.length - passed;
            return Ok(Known { length, ..known });
        }
        let known = self.status(offset).await?;
        self.last.set(Some((offset, known)));
        Ok(known)
    }

    async fn status(&self, offset: u64) -> Result<Known, End> {
        let visit = self.handle.visit().await;
        let range = ByteRange::new(offset, self.length - offset);
        match above(visit.node(), None, range).await {
            Ok(Above { length, status, .. }) => Ok(Known { length, status }),
            Err(_) => {
                let message = format!("Sector allocation test failed for {}", self.name);
                Err(End::Failed(Failure::message(message).with_code(NO_STATUS)))
            }
        }
    }

    fn unreadable(&self, offset: u64, errno: Errno) -> End {
        let reason = reason(errno);
        let message = format!(
            "Error while reading offset {offset} of {}: {reason}",
            self.name
        );
        End::Failed(Failure::message(message).with_code(NOT_READ))
    }
}

/// The images on one thread, and memory of earlier pieces.
struct Reader {
    handles: [RootHandle; 2],
    memory: RefCell<Vec<HeapBuffer>>,
}

/// What a piece is looked at for.
#[derive(Clone, Copy)]
enum Question {
    /// Whether both images read the same.
    Same,
    /// Whether this one (by its number) is all zero.
    Zero(usize),
}

/// Which image could not be read, and why.
struct Unread(usize, Errno);

impl Reader {
    fn new(roots: &[Root; 2]) -> Self {
        Self {
            handles: roots.each_ref().map(Root::attach),
            memory: RefCell::default(),
        }
    }

    /// Where the answer to `question` is no.
    async fn look(&self, question: Question, range: ByteRange) -> Result<Option<u64>, Unread> {
        let (found, read) = match question {
            Question::Same => {
                let (one, other) = (self.read(0, range).await?, self.read(1, range).await?);
                (first_difference(&one, &other), vec![one, other])
            }
            Question::Zero(side) => {
                let bytes = self.read(side, range).await?;
                (first_nonzero(&bytes), vec![bytes])
            }
        };
        self.memory.borrow_mut().extend(read);
        Ok(found.map(|at| range.offset + at as u64))
    }

    async fn read(&self, side: usize, range: ByteRange) -> Result<HeapBuffer, Unread> {
        let length = range.length as usize;
        let kept = self.memory.borrow_mut().pop();
        let memory = match kept {
            Some(memory) if memory.len() == length => memory,
            _ => HeapBuffer::zeroed(length),
        };
        let buffer = memory.into_buffer();
        let read = self.handles[side].read(range.offset, buffer.clone()).await;
        read.map_err(|errno| Unread(side, errno))?;
        Ok(buffer.into_heap())
    }
}

/// Who reads: this thread, and others that help.
struct Readers {
    here: Reader,
    crew: Option<Crew<Reader>>,
}

impl Readers {
    fn start(images: &[Image]) -> Self {
        let roots = [images[0].root.clone(), images[1].root.clone()];
        let here = Reader::new(&roots);
        let bytes = here.handles.each_ref().map(RootHandle::length);
        let crew = helpers::start(bytes[0].max(bytes[1]), move || Reader::new(&roots));
        Self { here, crew }
    }

    async fn look(&self, question: Question, range: ByteRange) -> Result<Option<u64>, Unread> {
        match self.crew.as_ref().filter(|crew| crew.has_room()) {
            None => self.here.look(question, range).await,
            Some(crew) => {
                let work =
                    move |reader: Rc<Reader>| async move { reader.look(question, range).await };
                let answer = crew.call(work).await;
                answer.unwrap_or(Err(Unread(0, Errno::EIO)))
            }
        }
    }
}

fn differ(offset: u64) -> End {
    End::Differ(format!("Content mismatch at offset {offset}!"))
}

async fn compare(
    sides: &[Side<'_>; 2],
    readers: &Readers,
    (strictness, (common, progress)): (Strictness, (&Common, &Progress)),
) -> Result<(), End> {
    let [first, second] = sides;
    let (shorter, longer) = match first.length <= second.length {
        true => (first, second),
        false => (second, first),
    };
    let check = |question, range| check((sides, readers), question, range);
    let is_strict = strictness == Strictness::Strict;
    if is_strict && shorter.length != longer.length {
        let message = "Strict mode: Image size mismatch!";
        return Err(End::Differ(message.to_owned()));
    }
    let mut window = Window::new(PIECES);
    let mut at = 0;
    while at < shorter.length {
        let looked = match (first.known(at).await, second.known(at).await) {
            (Ok(one), Ok(other)) => Ok([one, other]),
            (Err(end), _) | (_, Err(end)) => Err(end),
        };
        let [one, other] = match looked {
            Ok(known) => known,
            // What was begun comes first.
            Err(end) => return finish(&mut window).await.and(Err(end)),
        };
        let mut length = one.length.min(other.length).min(shorter.length - at);
        let at_end = |known: Known, side: &Side<'_>| at + known.length == side.length;
        if is_strict && one.kind(at_end(one, first)) != other.kind(at_end(other, second)) {
            finish(&mut window).await?;
            let message = format!("Strict mode: Offset {at} block status mismatch!");
            return Err(End::Differ(message));
        }
        let is_zero = one.status.zero && other.status.zero;
        let nothing = !one.is_allocated() && !other.is_allocated();
        if !is_zero && !nothing {
            length = length.min(PIECE_BYTES);
            make_room(&mut window).await?;
            let range = ByteRange::new(at, length);
            window.push(match (one.is_allocated(), other.is_allocated()) {
                (true, true) => check(Question::Same, range),
                (true, false) => check(Question::Zero(0), range),
                _ => check(Question::Zero(1), range),
            });
        }
        at += length;
        progress.at(at, longer.length);
    }
    finish(&mut window).await?;
    if shorter.length != longer.length {
        common.say("Warning: Image size mismatch!");
    }
    while at < longer.length {
        let known = longer.known(at).await;
        let known = match known {
            Ok(known) => known,
            Err(end) => return finish(&mut window).await.and(Err(end)),
        };
        let mut length = known.length.min(longer.length - at);
        if known.is_allocated() && !known.status.zero {
            length = length.min(PIECE_BYTES);
            make_room(&mut window).await?;
            let number = usize::from(std::ptr::eq(longer, second));
            window.push(check(Question::Zero(number), ByteRange::new(at, length)));
        }
        at += length;
        progress.at(at, longer.length);
    }
    finish(&mut window).await
}

/// Fails when the answer to `question` is no, or not to be had.
async fn check(
    (sides, readers): (&[Side<'_>; 2], &Readers),
    question: Question,
    range: ByteRange,
) -> Result<(), End> {
    match readers.look(question, range).await {
        Ok(None) => Ok(()),
        Ok(Some(at)) => Err(differ(at)),
        Err(Unread(side, errno)) => Err(sides[side].unreadable(range.offset, errno)),
    }
}

/// Waits until another piece may begin.
async fn make_room(window: &mut Window<'_, Result<(), End>>) -> Result<(), End> {
    match window.has_room() {
        true => Ok(()),
        false => window.first().await.unwrap_or(Ok(())),
    }
}

/// Waits for all pieces, in order.
async fn finish(window: &mut Window<'_, Result<(), End>>) -> Result<(), End> {
    while let Some(result) = window.first().await {
        result?;
    }
    Ok(())
}
