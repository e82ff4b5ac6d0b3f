//! What a run has open, and the requests that are under way.

use crate::command::{Needs, Problem};
use block::edge::Permissions;
use block::{
    Buffer, ByteRange, Errno, Node, Root, RootHandle, StatusExtent, WriteFlags, ZeroFlags,
};
use executor::JoinHandle;
use serde_json::{Map, Value};
use std::cell::{Cell, OnceCell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use tools::image::{Notation, Tool, warn_of_guess};

/// A run.
pub(crate) struct Session<'t> {
    /// The graph.
    pub(crate) tool: &'t Tool,
    /// How files to open are written, on the command line and for `open`.
    pub(crate) notation: Notation,
    image: RefCell<Option<Rc<Opened>>>,
    pending: RefCell<Vec<JoinHandle<()>>>,
    /// The user wants to leave.
    pub(crate) quit: Cell<bool>,
}

/// When writes are durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteCache {
    /// When they are flushed.
    Back,
    /// When they complete.
    Through,
}

/// Which way a file may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    ReadOnly,
    ReadWrite,
}

/// How the open file was opened, for another time.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// The options of its node, all of them.
    pub(crate) options: Map<String, Value>,
    /// What the user may do with it.
    pub(crate) mode: Mode,
    /// When writes are durable.
    pub(crate) cache: WriteCache,
}

/// The open file.
pub(crate) struct Opened {
    handle: RootHandle,
    node: Arc<Node>,
    /// Taken when the length is to be changed for the first time.
    resizing: OnceCell<Root>,
    /// How it was opened.
    pub(crate) recipe: Recipe,
    _root: Root,
}

impl<'t> Session<'t> {
    /// Without a file.
    pub(crate) fn new(tool: &'t Tool, notation: Notation) -> Self {
        Self {
            tool,
            notation,
            image: RefCell::default(),
            pending: RefCell::default(),
            quit: Cell::new(false),
        }
    }

    /// The open file.
    pub(crate) fn image(&self) -> Option<Rc<Opened>> {
        self.image.borrow().clone()
    }

    /// The open file, for commands that were not called without one.
    pub(crate) fn opened(&self) -> Result<Rc<Opened>, Problem> {
        let missing = || Problem::Plain("no file open, try 'help open'".to_owned());
        self.image().ok_or_else(missing)
    }

    /// Makes `image` the open file.
    pub(crate) fn set(&self, image: Opened) {
        self.image.replace(Some(Rc::new(image)));
    }

    /// Lets a request go on while other commands run.
    pub(crate) fn begin(&self, request: impl Future<Output = ()> + 'static) {
        let handle = executor::spawn(request);
        self.pending.borrow_mut().push(handle);
    }

    /// Waits until no request is under way.
    pub(crate) async fn settle(&self) {
        loop {
            let Some(request) = self.pending.borrow_mut().pop() else {
                return;
            };
            request.await;
        }
    }

    /// Closes the open file, if there is one, and gives the way it was opened.
    pub(crate) async fn close(&self) -> Option<(Recipe, Result<(), block::Error>)> {
        self.settle().await;
        let image = self.image.take()?;
        let name = image.node.name().to_owned();
        let recipe = image.recipe.clone();
        drop(image);
        Some((recipe, self.tool.graph().remove(&name).await))
    }
}

impl Opened {
    /// Opens the node of a recipe.
    pub(crate) async fn open(tool: &Tool, mut recipe: Recipe) -> Result<Self, block::Error> {
        let node = tool.graph().add(recipe.options.clone()).await?;
        if !recipe.options.contains_key("driver") {
            warn_of_guess(&node);
            // The format stays what it is when the file is opened again.
            let driver = node.driver().driver_name();
            recipe.options.insert("driver".into(), driver.into());
        }
        let permissions = match recipe.mode {
            Mode::ReadOnly => Permissions::READ,
            Mode::ReadWrite => Permissions::READ_WRITE,
        };
        let root = match Root::new("", &node, permissions, Permissions::ALL) {
            Ok(root) => root,
            Err(error) => {
                let name = node.name().to_owned();
                drop(node);
                tool.graph().remove(&name).await?;
                return Err(error);
            }
        };
        Ok(Self {
            handle: root.attach(),
            node,
            resizing: OnceCell::new(),
            recipe,
            _root: root,
        })
    }

    /// Its node.
    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Takes the permission for a command that needs it.
    pub(crate) fn permit(&self, needs: Needs) -> Result<(), Problem> {
        let writes = matches!(needs, Needs::Write | Needs::Resize);
        if writes && self.recipe.mode == Mode::ReadOnly {
            return Err(Problem::Error("Block node is read-only".to_owned()));
        }
        if needs == Needs::Resize && self.resizing.get().is_none() {
            let permissions = Permissions {
                write: true,
                resize: true,
                ..Permissions::NONE
            };
            let root = Root::new("", &self.node, permissions, Permissions::ALL);
            let root = root.map_err(|error| Problem::block("", &error))?;
            self.resizing.get_or_init(|| root);
        }
        Ok(())
    }

    /// The length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.handle.length()
    }

    /// `EIO` beyond the end.
    fn check(&self, range: ByteRange) -> Result<(), Errno> {
        match range.checked_end() {
            Some(end) if end <= self.length() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    fn through(&self) -> bool {
        self.recipe.cache == WriteCache::Through
    }

    pub(crate) async fn read(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        self.check(ByteRange::new(offset, buffer.len() as u64))?;
        self.handle.read(offset, buffer).await
    }

    pub(crate) async fn write(
        &self,
        offset: u64,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        self.check(ByteRange::new(offset, buffer.len() as u64))?;
        let fua = flags.fua || self.through();
        self.handle
            .write(offset, buffer, WriteFlags { fua, ..flags })
            .await
    }

    pub(crate) async fn write_zeroes(
        &self,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        self.check(range)?;
        let fua = flags.fua || self.through();
        self.handle
            .write_zeroes(range, ZeroFlags { fua, ..flags })
            .await
    }

    pub(crate) async fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        self.check(range)?;
        self.handle.discard(range).await
    }

    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        self.handle.flush().await
    }

    /// What is known about the start of a range of the file itself.
    pub(crate) async fn status(&self, range: ByteRange) -> Result<StatusExtent, Errno> {
        self.handle.visit().await.node().block_status(range).await
    }

    /// Reads saved machine state.
    pub(crate) async fn read_state(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let visit = self.handle.visit().await;
        let state = visit.node().driver().machine_state();
        let state = state.ok_or(Errno::EOPNOTSUPP)?;
        state.read(offset, buffer).await
    }

    /// Writes saved machine state.
    pub(crate) async fn write_state(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let visit = self.handle.visit().await;
        let state = visit.node().driver().machine_state();
        let state = state.ok_or(Errno::EOPNOTSUPP)?;
        state.write(offset, buffer).await?;
        drop(visit);
        match self.through() {
            true => self.handle.flush().await,
            false => Ok(()),
        }
    }
}
