//! The thread of one device: carries out orders, keeps the connection, starts it again when it breaks.
//!
//! ```text
//!          dial + open ok               Activate (and not paused)
//! away ------------------> connected -----------------------------> started
//!   ^                          |  ^                                    |
//!   |  back-end goes away      |  +--- Pause (drain), Reset -----------+
//!   +--------------------------+---------------------------------------+
//! ```
//!
//! What the driver agreed to ([`Activation`]) and the inflight region outlive the connection, so a new back-end is brought
//! to where the old one was. The guest keeps running and sees a pause.

use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::reconnect::{Backoff, Dialer};
use super::session::{Progress, Session, Setup, rings_are_valid};
use super::wire::LinkError;
use super::{Activation, Command};

/// State of the thread.
pub(super) struct Worker {
    name: String,
    dialer: Dialer,
    setup: Setup,
    commands: Receiver<Command>,
    session: Option<Session>,
    started: bool,
    paused: bool,
    activation: Option<Activation>,
    progress: Progress,
    /// What the driver wrote to its switch ([`Model::switch`](super::model::Model::switch)).
    switched: Option<u8>,
    backoff: Backoff,
    next_attempt: Instant,
    away_since: Option<Instant>,
    last_complaint: String,
}

/// What ended a wait, beside an order.
struct Ready {
    socket: bool,
    channel: bool,
    watch: bool,
}

enum Flow {
    Continue,
    Quit,
}

impl Worker {
    pub(super) fn new(
        name: String,
        dialer: Dialer,
        setup: Setup,
        commands: Receiver<Command>,
    ) -> Self {
        Self {
            name,
            dialer,
            setup,
            commands,
            session: None,
            started: false,
            paused: false,
            activation: None,
            progress: Progress::default(),
            switched: None,
            backoff: Backoff::default(),
            next_attempt: Instant::now(),
            away_since: None,
            last_complaint: String::new(),
        }
    }

    /// Runs until told to quit.
    pub(super) fn run(mut self) {
        loop {
            self.dialer.wake().clear();
            while let Ok(command) = self.commands.try_recv() {
                if let Flow::Quit = self.obey(command) {
                    return;
                }
            }
            if self.session.is_none() && Instant::now() >= self.next_attempt {
                self.connect();
            }
            self.start_if_wanted();
            self.wait();
        }
    }

    fn obey(&mut self, command: Command) -> Flow {
        match command {
            Command::Activate(activation) => self.activate(activation),
            Command::Reset(reply) => {
                self.reset();
                // Who asked may have stopped waiting.
                let _ = reply.send(());
            }
            Command::WriteSwitch => self.write_switch(),
            Command::Pause(reply) => {
                self.paused = true;
                self.drain();
                let _ = reply.send(());
            }
            Command::Resume => self.paused = false,
            Command::Quit => return Flow::Quit,
        }
        Flow::Continue
    }

    /// Runs `step` on the session, if there is one; a failure ends the session.
    fn with_session<T>(
        &mut self,
        step: impl FnOnce(&mut Session, &Setup) -> Result<T, LinkError>,
    ) -> Option<T> {
        let session = self.session.as_mut()?;
        match step(session, &self.setup) {
            Ok(value) => Some(value),
            Err(error) => {
                self.disconnect(&error);
                None
            }
        }
    }

    fn activate(&mut self, activation: Activation) {
        if rings_are_valid(&self.setup.memory, &activation) {
            self.activation = Some(activation);
            return;
        }
        tracing::error!(
            device = self.name,
            "the guest put a ring outside its memory"
        );
        self.setup.shared.lock().broken = true;
        self.setup.shared.notifiers.config.raise();
    }

    fn reset(&mut self) {
        if let Some(activation) = self.activation.take()
            && self.started
        {
            self.with_session(|session, setup| session.reset(setup, &activation));
        }
        self.started = false;
        self.progress = Progress::default();
        if self.switched.take().is_some() {
            self.refresh_config();
        }
        self.setup.shared.lock().resetting = false;
    }

    fn write_switch(&mut self) {
        let Some(at) = self.setup.model.switch() else {
            return;
        };
        let mut state = self.setup.shared.lock();
        state.write_switch = false;
        let value = state.config[at];
        drop(state);
        self.switched = Some(value);
        let agreed = self.with_session(|session, _| session.write_config(at, &[value]));
        if agreed == Some(false) {
            tracing::warn!(
                device = self.name,
                value,
                "the back-end keeps its configuration"
            );
            self.switched = None;
            self.refresh_config();
        }
    }

    fn drain(&mut self) {
        if !self.started {
            return;
        }
        let Some(activation) = self.activation.clone() else {
            return;
        };
        if let Some(bases) = self.with_session(|session, setup| session.drain(setup, &activation)) {
            self.progress.bases = bases;
        }
        self.started = false;
    }

    fn start_if_wanted(&mut self) {
        if self.started || self.paused {
            return;
        }
        let (Some(session), Some(activation)) = (&mut self.session, &self.activation) else {
            return;
        };
        let announced = session.announce_config(&self.setup);
        if let Ok(false) = announced {
            let text = "the back-end keeps its address, the guest has the command line's";
            tracing::warn!(device = self.name, "{text}");
        }
        let started =
            announced.and_then(|_| session.start(&self.setup, activation, &mut self.progress));
        match started {
            Ok(()) => {
                self.started = true;
                self.progress.bases.clear();
                self.tell_about_return();
            }
            Err(error) => self.disconnect(&error),
        }
    }

    fn tell_about_return(&mut self) {
        self.last_complaint.clear();
        if let Some(since) = self.away_since.take() {
            let away_ms = since.elapsed().as_millis() as u64;
            tracing::info!(
                device = self.name,
                away_ms,
                "the back-end is back, the guest goes on"
            );
        }
    }

    fn connect(&mut self) {
        let link = match self.dialer.dial() {
            Ok(link) => link,
            Err(error) => {
                self.next_attempt = Instant::now() + self.backoff.after_absence();
                self.complain(&format!("waiting for a back-end ({error})"));
                return;
            }
        };
        match self.open(link) {
            Ok(session) => {
                if self.setup.model.kind().needs_inflight && !session.tracks_inflight() {
                    let text = "no INFLIGHT_SHMFD: requests may be lost or repeated if it dies";
                    tracing::warn!(device = self.name, "the back-end has {text}");
                }
                self.session = Some(session);
                self.backoff.clear();
                if self.activation.is_none() {
                    self.away_since = None;
                    self.last_complaint.clear();
                }
                tracing::info!(
                    device = self.name,
                    "connected to {}",
                    self.dialer.path().display()
                );
            }
            Err(error) => self.disconnect(&error),
        }
    }

    fn open(&mut self, link: super::wire::Link) -> Result<Session, LinkError> {
        let mut session = Session::open(link, &self.setup)?;
        let mut config = session.read_config(&self.setup)?;
        if let (Some(at), Some(value)) = (self.setup.model.switch(), self.switched)
            && session.write_config(at, &[value])?
        {
            config[at] = value;
        }
        self.publish(Some(session.features(&self.setup)), config);
        Ok(session)
    }

    /// Shows the guest features and configuration; raises the configuration interrupt if a running guest sees a change.
    fn publish(&self, features: Option<u64>, config: Vec<u8>) {
        let mut state = self.setup.shared.lock();
        let changed = state.config != config;
        state.config = config;
        if features.is_some() {
            state.features = features;
        }
        if changed {
            state.generation = state.generation.wrapping_add(1);
        }
        drop(state);
        if changed && self.activation.is_some() {
            self.setup.shared.notifiers.config.raise();
        }
        self.setup.shared.gate.device_changed();
    }

    fn refresh_config(&mut self) {
        if let Some(config) = self.with_session(|session, setup| session.read_config(setup)) {
            self.publish(None, config);
        }
    }

    fn disconnect(&mut self, error: &LinkError) {
        let had_session = self.session.take().is_some();
        if self.started || (had_session && self.activation.is_some()) {
            self.away_since.get_or_insert_with(Instant::now);
            self.progress.bases.clear();
        }
        self.started = false;
        let delay = match error {
            LinkError::Refused(_) | LinkError::Rejected(_) => self.backoff.after_refusal(),
            LinkError::Gone(_) => self.backoff.after_absence(),
            LinkError::Interrupted => Duration::ZERO,
        };
        self.next_attempt = Instant::now() + delay;
        match error {
            LinkError::Interrupted => {}
            LinkError::Gone(_) => self.complain(&error.to_string()),
            LinkError::Refused(_) | LinkError::Rejected(_) => {
                let text = error.to_string();
                if self.last_complaint != text {
                    tracing::error!(
                        device = self.name,
                        "{}: {text}",
                        self.dialer.path().display()
                    );
                    self.last_complaint = text;
                }
            }
        }
    }

    /// Warns once about each new reason.
    fn complain(&mut self, text: &str) {
        if self.last_complaint != text {
            tracing::warn!(
                device = self.name,
                "{}: {text}",
                self.dialer.path().display()
            );
            text.clone_into(&mut self.last_complaint);
        }
    }

    /// Waits for an order, a message, the end of the connection or the time of the next attempt.
    fn wait(&mut self) {
        let ready = self.poll();
        if ready.watch && self.dialer.socket_appeared() {
            // It appears before it listens: if the first attempt fails, the next ones follow quickly.
            self.backoff.clear();
            self.next_attempt = Instant::now();
        }
        if ready.channel {
            self.with_session(|session, _| session.link.serve_channel());
        }
        if ready.socket
            && let Some(session) = &self.session
        {
            let error = session.link.unexpected();
            self.disconnect(&error);
        }
        let changed = self
            .session
            .as_mut()
            .is_some_and(|session| session.link.take_config_change());
        if changed {
            self.refresh_config();
        }
    }

    fn poll(&self) -> Ready {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![readable(self.dialer.wake().as_fd())];
        let mut timeout = PollTimeout::NONE;
        if let Some(session) = &self.session {
            fds.push(readable(session.link.socket().as_fd()));
            fds.extend(
                session
                    .link
                    .channel()
                    .map(|channel| readable(channel.as_fd())),
            );
        } else {
            fds.push(readable(self.dialer.watch()));
            timeout = timeout_until(self.next_attempt);
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("poll of a device's own descriptors: {error}"),
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false));
        let connected = self.session.is_some();
        Ready {
            socket: connected && ready(1),
            channel: connected && ready(2),
            watch: !connected && ready(1),
        }
    }
}

/// The time left, rounded up to a millisecond, so that the deadline has passed afterwards.
fn timeout_until(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = left.as_micros().div_ceil(1000);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}
