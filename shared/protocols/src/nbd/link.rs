//! A thread's way to the server: a session while there is one, and how the next one comes about.
//!
//! ```text
//!            connection lost                    another session
//!   Up ─────────────────────► Down ──dialling──────────────────► Up
//!    │                         │ requests wait until `reconnect-delay` is over, then fail;
//!    │ protocol broken, close  │ each request after that starts another attempt
//!    └─────────────────────────┴──► Closed: every request fails
//! ```
//!
//! A request that was under way when the connection was lost is sent again on the next one: NBD's
//! requests may be repeated. A link belongs to one thread.

use super::handshake::{self, Agreement};
use super::session::{Answer, End, Failure, Session};
use super::target::Target;
use block::error::Result;
use block::{Buffer, Errno, Error, ErrorKind};
use executor::sync::{Notify, Semaphore};
use executor::time::{self, Backoff};
use nbd::Request;
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use transport::Connection;

/// Requests of a link that the server has at the same time.
const MAX_REQUESTS: usize = 64;

/// First and longest time between attempts to connect again.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(16));

enum State {
    Up(Rc<Session>),
    Down {
        /// Until when requests wait.
        until: Duration,
        /// Somebody tries to connect.
        dialling: bool,
    },
    Closed,
}

/// See the module.
pub(super) struct Link {
    target: Arc<Target>,
    /// What the first session agreed on; later ones must agree on the same.
    agreement: Agreement,
    state: RefCell<State>,
    changed: Notify,
    slots: Semaphore,
}

/// One attempt to get a session.
pub(super) async fn attempt(target: &Target) -> Result<Rc<Session>> {
    let connection = Connection::plain(target.connect().await?);
    let (connection, agreement) = handshake::run(connection, target).await?;
    Ok(Session::start(connection, agreement))
}

/// A session with the server, which may take the target's `open-timeout` to appear.
///
/// # Errors
/// Those of the last attempt.
pub(super) async fn first_session(target: &Target) -> Result<Rc<Session>> {
    let until = time::now().saturating_add(target.open_timeout);
    let mut backoff = Backoff::new(PAUSE);
    loop {
        let error = match attempt(target).await {
            Ok(session) => return Ok(session),
            Err(error) => error,
        };
        let left = until.saturating_sub(time::now());
        if left.is_zero() || !handshake::is_worth_retrying(&error) {
            return Err(error);
        }
        backoff.pause_at_most(left).await;
    }
}

impl Link {
    /// A link with a session.
    pub(super) fn up(target: Arc<Target>, session: Rc<Session>) -> Rc<Self> {
        let agreement = session.agreement;
        Self::new(target, agreement, State::Up(session))
    }

    fn new(target: Arc<Target>, agreement: Agreement, state: State) -> Rc<Self> {
        Rc::new(Self {
            target,
            agreement,
            state: RefCell::new(state),
            changed: Notify::new(),
            slots: Semaphore::new(MAX_REQUESTS),
        })
    }

    /// Sends a request, on as many connections one after another as it takes.
    ///
    /// # Errors
    /// The server's; `EIO` without a connection.
    pub(super) async fn call(
        self: &Rc<Self>,
        request: Request,
        buffer: Option<Buffer>,
    ) -> std::result::Result<Answer, Errno> {
        let _slot = self.slots.acquire().await;
        loop {
            let session = self.session().await?;
            match session.call(request, buffer.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Refused(errno)) => return Err(errno),
                Err(Failure::Ended(_)) if self.target.reconnect_delay.is_zero() => {
                    return Err(Errno::EIO);
                }
                Err(Failure::Ended(_)) => {}
            }
        }
    }

    /// The session, when there is one in time.
    async fn session(self: &Rc<Self>) -> std::result::Result<Rc<Session>, Errno> {
        loop {
            let changed = self.changed.notified();
            let left = match self.look() {
                Look::Ready(session) => return Ok(session),
                Look::Closed => return Err(Errno::EIO),
                Look::Down(left) => left,
            };
            self.dial();
            if left.is_zero() {
                return Err(Errno::EIO);
            }
            time::timeout(left, changed).await;
        }
    }

    /// The state, once what happened to the session is taken in.
    fn look(&self) -> Look {
        let mut state = self.state.borrow_mut();
        if let State::Up(session) = &*state {
            match session.end() {
                None => return Look::Ready(Rc::clone(session)),
                Some(End::Broken) => *state = State::Closed,
                Some(End::Lost) => {
                    *state = State::Down {
                        until: time::now().saturating_add(self.target.reconnect_delay),
                        dialling: false,
                    }
                }
            }
        }
        match &*state {
            State::Down { until, .. } => Look::Down(until.saturating_sub(time::now())),
            _ => Look::Closed,
        }
    }

    /// Starts connecting unless somebody does already.
    fn dial(self: &Rc<Self>) {
        if let State::Down { dialling, .. } = &mut *self.state.borrow_mut()
            && !std::mem::replace(dialling, true)
        {
            let link = Rc::downgrade(self);
            drop(executor::spawn(keep_dialling(link)));
        }
    }

    /// Takes over the outcome of an attempt; whether there is to be another one.
    fn dialled(&self, outcome: Result<Rc<Session>>) -> bool {
        let mut state = self.state.borrow_mut();
        let State::Down { until, dialling } = &mut *state else {
            return false;
        };
        match outcome.and_then(|session| self.check(session)) {
            Ok(session) => {
                tracing::info!("connected to the NBD server again");
                *state = State::Up(session);
            }
            Err(error) => {
                tracing::warn!(%error, "connecting to the NBD server again failed");
                let again = time::now() < *until;
                *dialling = again;
                if again {
                    return true;
                }
            }
        }
        drop(state);
        self.changed.notify_all();
        false
    }

    /// The export must be what it was.
    fn check(&self, session: Rc<Session>) -> Result<Rc<Session>> {
        let (old, new) = (self.agreement, session.agreement);
        match (old.size, old.flags, old.sizes) == (new.size, new.flags, new.sizes) {
            true => Ok(session),
            false => {
                let message = "the export is not what it was before the connection was lost";
                Err(Error::new(ErrorKind::Io, message))
            }
        }
    }

    /// Ends the link; requests fail from now on.
    pub(super) async fn close(&self) {
        let state = std::mem::replace(&mut *self.state.borrow_mut(), State::Closed);
        self.changed.notify_all();
        if let State::Up(session) = state {
            session.disconnect().await;
        }
    }
}

enum Look {
    Ready(Rc<Session>),
    /// How long requests still wait.
    Down(Duration),
    Closed,
}

/// Tries to connect until it works, the time for it is over, or the link is gone.
async fn keep_dialling(link: Weak<Link>) {
    let mut backoff = Backoff::new(PAUSE);
    loop {
        let Some(target) = link.upgrade().map(|link| Arc::clone(&link.target)) else {
            return;
        };
        let outcome = attempt(&target).await;
        let Some(link) = link.upgrade() else { return };
        if !link.dialled(outcome) {
            return;
        }
        drop(link);
        backoff.pause().await;
    }
}
