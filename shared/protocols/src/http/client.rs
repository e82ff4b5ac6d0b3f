//! A thread's client: libcurl, whose waiting is the executor's.
//!
//! ```text
//!   read ──► Pieces::plan ──► fetch (a task for each new piece, 8 at a time)
//!                               │ redirections, the place found before
//!                               ▼
//!                          transfer ──► Multi ── socket, timer ──► ReadySet, sleep
//!                               ▲          │ Receiver fills the piece
//!                               └── Done ◄─┴── settle: after each call into libcurl
//! ```
//!
//! libcurl's callbacks only note what it wants; nothing calls into it while it runs.

use super::answer::{Failure, Receiver, Remote};
use super::pieces::{Piece, Pieces};
use super::target::{MAX_REDIRECTS, Place, Target};
use super::trust;
use block::{Buffer, ByteRange, Errno};
use curl::easy::{Easy2, HttpVersion, List};
use curl::multi::{Easy2Handle, Events, Multi, SocketEvents};
use executor::ready_set::{Readiness, ReadySet};
use executor::sync::{Latch, Semaphore};
use executor::{JoinHandle, time};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use transport::names;

/// Transfers of a thread at the same time, each on a connection of its own.
const MAX_TRANSFERS: usize = 8;

/// What libcurl receives at a time, in bytes.
const RECEIVE: usize = 256 << 10;

/// What the threads of a node share.
pub(super) struct Shared {
    pub(super) target: Target,
    /// Set when the first answer has come.
    pub(super) remote: OnceLock<Arc<Remote>>,
    /// TCP ports that connections were made to.
    pub(super) ports: Mutex<Vec<u16>>,
}

/// What libcurl wants, as its callbacks note it.
#[derive(Default)]
struct Wants {
    sockets: Vec<(RawFd, Option<Readiness>)>,
    timer: Option<Option<Duration>>,
}

/// A finished transfer.
struct Done {
    outcome: Result<Remote, Failure>,
    /// Where the server sent us.
    redirection: Option<String>,
    is_refusal: bool,
}

/// Where whoever began a transfer waits for its end.
#[derive(Default)]
struct Ticket {
    done: RefCell<Option<Done>>,
    ended: Latch,
}

struct Running {
    handle: Easy2Handle<Receiver>,
    ticket: Rc<Ticket>,
}

/// See the module.
pub(super) struct Client {
    shared: Arc<Shared>,
    multi: Multi,
    wants: Arc<Mutex<Wants>>,
    sockets: Rc<ReadySet>,
    running: RefCell<Slab<Running>>,
    timer: RefCell<Option<JoinHandle<()>>>,
    pump: RefCell<Option<JoinHandle<()>>>,
    pieces: Pieces,
    slots: Semaphore,
    /// Where the file was found last, when not where the user says.
    found: RefCell<Option<Place>>,
    closed: Cell<bool>,
}

impl Client {
    /// # Errors
    /// What making an epoll instance may fail with.
    pub(super) fn new(shared: Arc<Shared>) -> Result<Rc<Self>, Errno> {
        let wants = Arc::new(Mutex::new(Wants::default()));
        let client = Rc::new(Self {
            shared,
            multi: multi(&wants),
            wants,
            sockets: Rc::new(ReadySet::new()?),
            running: RefCell::default(),
            timer: RefCell::default(),
            pump: RefCell::default(),
            pieces: Pieces::default(),
            slots: Semaphore::new(MAX_TRANSFERS),
            found: RefCell::default(),
            closed: Cell::new(false),
        });
        let pump = executor::spawn(pump(Rc::downgrade(&client), Rc::clone(&client.sockets)));
        *client.pump.borrow_mut() = Some(pump);
        Ok(client)
    }

    /// Fetches the beginning of the file, and with it what the file is.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub(super) async fn first(self: &Rc<Self>, length: u64) -> Result<Arc<Remote>, Failure> {
        let piece = Piece::new(ByteRange::new(0, length));
        let outcome = self.follow(&piece).await;
        piece.finish();
        let remote = Arc::new(outcome?);
        self.pieces.add(piece);
        Ok(Arc::clone(self.shared.remote.get_or_init(|| remote)))
    }

    /// Reads a range within the file.
    pub(super) async fn read(self: &Rc<Self>, start: u64, buffer: Buffer) -> Result<(), Errno> {
        let remote = self.shared.remote.get().ok_or(Errno::EIO)?;
        let end = start
            .checked_add(buffer.len() as u64)
            .ok_or(Errno::EINVAL)?;
        let sizes = (self.shared.target.readahead, remote.length);
        let mut at = start;
        while at < end {
            let before = at;
            let (parts, new) = self.pieces.plan(ByteRange::new(at, end - at), sizes);
            for piece in new {
                drop(executor::spawn(Rc::clone(self).fetch(piece)));
            }
            for part in parts {
                at = part.deliver((&buffer, start)).await;
                if at < part.end() {
                    break;
                }
            }
            // A connection that is lost after it brought something earns another one.
            if at == before {
                return Err(Errno::EIO);
            }
        }
        Ok(())
    }

    async fn fetch(self: Rc<Self>, piece: Rc<Piece>) {
        let outcome = {
            let _slot = self.slots.acquire().await;
            self.follow(&piece).await
        };
        if let Err(failure) = outcome
            && !self.closed.get()
        {
            let ByteRange { offset, length } = piece.missing();
            let url = self.shared.target.place.shown();
            tracing::error!("curl: {failure} (reading {length} bytes at offset {offset} of {url})");
        }
        piece.finish();
    }

    /// Fetches what a piece misses, from where the server says that the file is.
    async fn follow(self: &Rc<Self>, piece: &Rc<Piece>) -> Result<Remote, Failure> {
        let origin = &self.shared.target.place;
        let found = self.found.borrow().clone();
        let mut is_remembered = found.is_some();
        let mut place = found.unwrap_or_else(|| origin.clone());
        for _ in 0..=MAX_REDIRECTS {
            let done = self.transfer(&place, piece).await?;
            if let Some(to) = done.redirection {
                place = Target::redirected(&place, &to).map_err(Failure::Redirection)?;
                continue;
            }
            // Such places may hold for a while only.
            if done.is_refusal && std::mem::take(&mut is_remembered) {
                place = origin.clone();
                continue;
            }
            let is_elsewhere = done.outcome.is_ok() && place.url != origin.url;
            *self.found.borrow_mut() = is_elsewhere.then_some(place);
            return done.outcome;
        }
        let message = format!("more than {MAX_REDIRECTS} redirections");
        Err(Failure::Redirection(message))
    }

    /// One request and its answer.
    async fn transfer(self: &Rc<Self>, place: &Place, piece: &Rc<Piece>) -> Result<Done, Failure> {
        let hosts = resolved(place).await;
        if self.closed.get() {
            return Err(Failure::Closed);
        }
        let known = self.shared.remote.get().cloned();
        let receiver = Receiver::new(piece.missing(), Rc::clone(piece), known);
        let broken = |error: curl::Error| Failure::Library(error.to_string());
        let easy = self
            .prepare((receiver, piece.missing()), place, hosts)
            .map_err(broken)?;
        let refused = |error: curl::MultiError| Failure::Library(error.to_string());
        let handle = self.multi.add2(easy).map_err(refused)?;
        let ticket = Rc::new(Ticket::default());
        let key = self.running.borrow_mut().insert(Running {
            handle,
            ticket: Rc::clone(&ticket),
        });
        if let Some(running) = self.running.borrow_mut().get_mut(key) {
            running.handle.set_token(key).map_err(broken)?;
        }
        self.settle();
        ticket.ended.wait().await;
        ticket.done.take().ok_or(Failure::Closed)
    }

    fn prepare(
        &self,
        (receiver, range): (Receiver, ByteRange),
        place: &Place,
        hosts: Option<List>,
    ) -> Result<Easy2<Receiver>, curl::Error> {
        let target = &self.shared.target;
        let mut easy = Easy2::new(receiver);
        easy.url(&place.url)?;
        let last = range.offset + range.length.saturating_sub(1);
        easy.range(&format!("{}-{last}", range.offset))?;
        easy.buffer_size(RECEIVE)?;
        easy.http_version(HttpVersion::V11)?;
        easy.tcp_nodelay(true)?;
        if let Some(hosts) = hosts {
            easy.resolve(hosts)?;
        }
        if !target.timeout.is_zero() {
            easy.connect_timeout(target.timeout)?;
            easy.low_speed_limit(1)?;
            easy.low_speed_time(target.timeout)?;
        }
        if place.is_secure() {
            easy.ssl_verify_peer(target.verifies)?;
            easy.ssl_verify_host(target.verifies)?;
            if let (true, Some(authorities)) = (target.verifies, trust::authorities()) {
                easy.ssl_cainfo_blob(authorities)?;
            }
        }
        self.introduce(&mut easy, place)?;
        Ok(easy)
    }

    /// Says who we are; to the server that the user meant only.
    fn introduce(&self, easy: &mut Easy2<Receiver>, place: &Place) -> Result<(), curl::Error> {
        let target = &self.shared.target;
        if let Some(name) = &target.proxy_username {
            easy.proxy_username(name)?;
        }
        if let Some(password) = &target.proxy_password {
            easy.proxy_password(&String::from_utf8_lossy(password))?;
        }
        if !place.is_same_server(&target.place) {
            return Ok(());
        }
        if let Some(name) = &target.username {
            easy.username(name)?;
        }
        if let Some(password) = &target.password {
            easy.password(&String::from_utf8_lossy(password))?;
        }
        if let Some(cookie) = &target.cookie {
            easy.cookie(&String::from_utf8_lossy(cookie))?;
        }
        Ok(())
    }

    /// Gives libcurl what it wants, and takes what it has finished.
    fn settle(self: &Rc<Self>) {
        loop {
            let wants = {
                let mut wants = self.wants.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *wants)
            };
            for (socket, wanted) in wants.sockets {
                self.watch(socket, wanted);
            }
            match wants.timer {
                None => break,
                Some(Some(Duration::ZERO)) => {
                    self.set_timer(None);
                    log(self.multi.timeout().err());
                }
                Some(timer) => {
                    self.set_timer(timer);
                    break;
                }
            }
        }
        for (key, result) in self.finished() {
            self.complete(key, result);
        }
    }

    fn watch(&self, socket: RawFd, wanted: Option<Readiness>) {
        match wanted {
            None => self.sockets.forget(socket),
            Some(wanted) => {
                if let Err(errno) = self.sockets.watch(socket, wanted) {
                    tracing::warn!(%errno, "a connection cannot be waited for");
                }
            }
        }
    }

    fn set_timer(self: &Rc<Self>, after: Option<Duration>) {
        let next = after.map(|after| {
            let client = Rc::downgrade(self);
            executor::spawn(async move {
                time::sleep(after).await;
                if let Some(client) = client.upgrade() {
                    // It has fired: there is nothing to cancel.
                    client.timer.take();
                    log(client.multi.timeout().err());
                    client.settle();
                }
            })
        });
        if let Some(old) = self.timer.replace(next) {
            old.cancel();
        }
    }

    fn finished(&self) -> Vec<(usize, Result<(), curl::Error>)> {
        let mut finished = Vec::new();
        let running = self.running.borrow();
        self.multi.messages(|message| {
            let Some(key) = message.token().ok() else {
                return;
            };
            let Some(one) = running.get(key) else { return };
            if let Some(result) = message.result_for2(&one.handle) {
                finished.push((key, result));
            }
        });
        finished
    }

    fn complete(&self, key: usize, result: Result<(), curl::Error>) {
        let Some(running) = self.running.borrow_mut().try_remove(key) else {
            return;
        };
        if let Ok(mut easy) = self.multi.remove2(running.handle) {
            self.note_port(easy.primary_port());
            *running.ticket.done.borrow_mut() = Some(done(&mut easy, result));
        }
        running.ticket.ended.set();
    }

    fn note_port(&self, port: Result<u16, curl::Error>) {
        let mut ports = self
            .shared
            .ports
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Ok(port @ 1..) = port
            && !ports.contains(&port)
        {
            ports.push(port);
        }
    }

    /// Ends all connections; reads fail from now on.
    pub(super) fn close(&self) {
        self.closed.set(true);
        for task in [self.pump.take(), self.timer.take()].into_iter().flatten() {
            task.cancel();
        }
        let running: Vec<Running> = self.running.borrow_mut().drain().collect();
        for one in running {
            // Dropping the handle ends its transfer.
            drop(self.multi.remove2(one.handle));
            one.ticket.ended.set();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        for task in [self.pump.take(), self.timer.take()].into_iter().flatten() {
            task.cancel();
        }
    }
}

fn log(error: Option<curl::MultiError>) {
    if let Some(error) = error {
        tracing::warn!(%error, "libcurl");
    }
}

fn multi(wants: &Arc<Mutex<Wants>>) -> Multi {
    let mut multi = Multi::new();
    let note = Arc::clone(wants);
    let sockets = move |socket: RawFd, events: SocketEvents, _token: usize| {
        let wanted = (!events.remove()).then(|| Readiness {
            readable: events.input() || events.input_and_output(),
            writable: events.output() || events.input_and_output(),
            broken: false,
        });
        let mut wants = note.lock().unwrap_or_else(PoisonError::into_inner);
        // A number may be given up and used again before we look.
        wants.sockets.retain(|(known, _)| *known != socket);
        wants.sockets.push((socket, wanted));
    };
    let note = Arc::clone(wants);
    let timer = move |after: Option<Duration>| {
        let mut wants = note.lock().unwrap_or_else(PoisonError::into_inner);
        wants.timer = Some(after);
        true
    };
    multi
        .socket_function(sockets)
        .and_then(|()| multi.timer_function(timer))
        .expect("libcurl knows these options");
    multi
}

/// Addresses of a server, as libcurl takes them; it asks no resolver itself then. Without an answer it asks, and
/// has the words for that it gets none.
async fn resolved(place: &Place) -> Option<List> {
    let (host, port) = (place.host(), place.port());
    if host.parse::<IpAddr>().is_ok() {
        return None;
    }
    let addresses = names::resolve(host, port).await.ok()?;
    let shown = addresses.iter().map(|address| match address.ip() {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    });
    let line = format!("{host}:{port}:{}", shown.collect::<Vec<_>>().join(","));
    let mut list = List::new();
    list.append(&line).ok()?;
    Some(list)
}

/// What a finished transfer came to.
fn done(easy: &mut Easy2<Receiver>, result: Result<(), curl::Error>) -> Done {
    let redirection = match easy.get_ref().is_redirection() {
        true => easy.redirect_url().ok().flatten().map(str::to_owned),
        false => None,
    };
    let receiver = easy.get_mut();
    let outcome = match (receiver.outcome(), result) {
        // What was wrong with the answer says more than that the transfer was ended for it.
        (Err(wrong), _) if receiver.has_answer() => Err(wrong),
        (_, Err(error)) => {
            let text = error.extra_description().unwrap_or(error.description());
            Err(Failure::Library(text.to_owned()))
        }
        (judged, Ok(())) => judged,
    };
    Done {
        outcome,
        redirection,
        is_refusal: receiver.is_refusal(),
    }
}

/// Lets libcurl go on whenever a connection is ready.
async fn pump(client: Weak<Client>, sockets: Rc<ReadySet>) {
    loop {
        let ready = match sockets.ready().await {
            Ok(ready) => ready,
            Err(errno) => {
                tracing::error!(%errno, "connections cannot be waited for");
                return;
            }
        };
        let Some(client) = client.upgrade() else {
            return;
        };
        for (socket, readiness) in ready {
            let mut events = Events::new();
            events
                .input(readiness.readable)
                .output(readiness.writable)
                .error(readiness.broken);
            log(client.multi.action(socket, &events).err());
        }
        client.settle();
    }
}
