//! The server: who comes in, and for how long.

use super::export::{Core, NbdExport, Several};
use super::handshake::{self, Agreed};
use super::session;
use executor::net::{Closer, Listener};
use executor::sync::Notify;
use executor::{Errno, Handle, JoinHandle, time};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use transport::{Authorization, Connection, Credentials};

/// How long a client may take from its connection to its first request.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long nobody is accepted when the process has no descriptor left and no client ends.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Hears a text.
pub type Report = Rc<dyn Fn(&str)>;

/// How a server treats its clients.
#[derive(Clone)]
pub struct NbdServerOptions {
    /// The most connections at a time; `None`: no limit.
    pub max_connections: Option<u32>,
    /// How long the handshake may take; `None`: no limit.
    pub handshake_timeout: Option<Duration>,
    /// What the server proves itself with; clients have to use TLS then.
    pub credentials: Option<Arc<Credentials>>,
    /// Which of the clients that have proved a name may come in.
    pub authorization: Option<Arc<Authorization>>,
    /// Hears why a client did not get through the handshake; without it, the log does.
    pub report: Option<Report>,
}

impl Default for NbdServerOptions {
    fn default() -> Self {
        Self {
            max_connections: None,
            handshake_timeout: Some(HANDSHAKE_TIMEOUT),
            credentials: None,
            authorization: None,
            report: None,
        }
    }
}

/// A running server. Lives on the control thread; dropping it stops accepting, [`NbdServer::stop`] ends the clients too.
pub struct NbdServer {
    state: Rc<State>,
    accepting: RefCell<Vec<JoinHandle<()>>>,
}

/// What the server and its clients' tasks share.
pub(super) struct State {
    options: NbdServerOptions,
    exports: RefCell<BTreeMap<String, Rc<NbdExport>>>,
    clients: RefCell<BTreeMap<u64, Client>>,
    /// Clients that were ever accepted.
    arrivals: Cell<u64>,
    /// Clients that got through the handshake and ended.
    served: Cell<u64>,
    /// A client came, moved on or went.
    changed: Notify,
}

/// A connection.
struct Client {
    closer: Closer,
    /// Once the handshake is over.
    export: Option<Arc<Core>>,
}

impl NbdServer {
    /// Serves clients of `listeners` on the current executor.
    pub fn start(listeners: Vec<Listener>, options: NbdServerOptions) -> Self {
        let state = Rc::new(State {
            options,
            exports: RefCell::default(),
            clients: RefCell::default(),
            arrivals: Cell::new(0),
            served: Cell::new(0),
            changed: Notify::new(),
        });
        let accepting = listeners.into_iter().map(|listener| {
            let state = Rc::clone(&state);
            executor::spawn(async move { state.accept_from(listener).await })
        });
        Self {
            accepting: RefCell::new(accepting.collect()),
            state,
        }
    }

    /// Offers an export. False when there is one of this name.
    pub fn add(&self, export: Rc<NbdExport>) -> bool {
        let mut exports = self.state.exports.borrow_mut();
        let name = export.name().to_owned();
        match exports.entry(name) {
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(export);
                true
            }
            std::collections::btree_map::Entry::Occupied(_) => false,
        }
    }

    /// Whether there is an export of this name.
    pub fn offers(&self, name: &str) -> bool {
        self.state.exports.borrow().contains_key(name)
    }

    /// Clients that an export has now.
    pub fn clients_of(&self, export: &NbdExport) -> usize {
        self.state.clients_of(export.core())
    }

    /// Stops offering an export, ends its clients, and resolves when their requests are done.
    pub async fn remove(&self, export: &NbdExport) {
        let is_this = |other: &Rc<NbdExport>| Arc::ptr_eq(other.core(), export.core());
        self.state
            .exports
            .borrow_mut()
            .retain(|_, other| !is_this(other));
        loop {
            let changed = self.state.changed.notified();
            if self.state.close_clients_of(export.core()) == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Takes no more clients, ends those that there are, and resolves when their requests are done. The exports stay, for somebody
    /// else to end.
    pub async fn stop(&self) {
        for task in self.accepting.borrow_mut().drain(..) {
            task.cancel();
        }
        self.state.exports.borrow_mut().clear();
        loop {
            let changed = self.state.changed.notified();
            if self.state.clients.borrow().is_empty() {
                return;
            }
            for client in self.state.clients.borrow().values() {
                client.closer.shutdown();
            }
            changed.await;
        }
    }

    /// Resolves when a client has been served and none is left.
    pub async fn last_client_left(&self) {
        loop {
            let changed = self.state.changed.notified();
            if self.state.served.get() > 0 && self.state.clients.borrow().is_empty() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        for task in self.accepting.borrow_mut().drain(..) {
            task.cancel();
        }
    }
}

impl State {
    async fn accept_from(self: Rc<Self>, listener: Listener) {
        loop {
            self.wait_for_room().await;
            match listener.accept().await {
                Ok(stream) => self.admit(Connection::plain(stream)),
                Err(Errno::ECANCELED | Errno::EBADF) => return,
                Err(errno) => {
                    tracing::warn!(%errno, "cannot accept a client");
                    let changed = self.changed.notified();
                    time::timeout(ACCEPT_PAUSE, changed).await;
                }
            }
        }
    }

    /// Waits while there are as many clients as may be.
    async fn wait_for_room(&self) {
        let limit = self.options.max_connections.map(|limit| limit as usize);
        loop {
            let changed = self.changed.notified();
            if limit.is_none_or(|limit| self.clients.borrow().len() < limit) {
                return;
            }
            changed.await;
        }
    }

    fn admit(self: &Rc<Self>, connection: Connection) {
        let number = self.arrivals.get();
        self.arrivals.set(number + 1);
        let client = Client {
            closer: connection.closer(),
            export: None,
        };
        self.clients.borrow_mut().insert(number, client);
        let state = Rc::clone(self);
        drop(executor::spawn(async move {
            let served = state.serve(number, connection).await;
            state.clients.borrow_mut().remove(&number);
            state.served.set(state.served.get() + u64::from(served));
            state.changed.notify_all();
        }));
    }

    /// A client's life; whether it got through the handshake.
    async fn serve(self: &Rc<Self>, number: u64, connection: Connection) -> bool {
        let negotiated = handshake::negotiate(connection, self);
        let negotiated = match self.options.handshake_timeout {
            None => negotiated.await,
            Some(limit) => match time::timeout(limit, Box::pin(negotiated)).await {
                Some(negotiated) => negotiated,
                None => Err("the client took too long".to_owned()),
            },
        };
        let (connection, agreed) = match negotiated {
            Ok(Some(negotiated)) => negotiated,
            Ok(None) => return false,
            Err(reason) => {
                match &self.options.report {
                    Some(report) => report(&reason),
                    None => {
                        tracing::warn!(client = number, "option negotiation failed: {reason}");
                    }
                }
                return false;
            }
        };
        let Agreed { export, terms } = agreed;
        let core = Arc::clone(export.core());
        match self.clients.borrow_mut().get_mut(&number) {
            Some(client) => client.export = Some(Arc::clone(&core)),
            None => return false,
        }
        self.changed.notify_all();
        // The export may have gone while its last reply was sent.
        if !self.has(&export) {
            return true;
        }
        let thread = export.thread();
        drop(export);
        let ended = if thread.is_current() {
            Some(session::run(connection, core, terms).await)
        } else {
            Handle::call(&thread, move || session::run(connection, core, terms)).await
        };
        if let Some(Err(reason)) = ended {
            tracing::debug!(client = number, "the client was disconnected: {reason}");
        }
        true
    }

    fn has(&self, export: &Rc<NbdExport>) -> bool {
        let exports = self.exports.borrow();
        let found = exports.get(export.name());
        found.is_some_and(|found| Rc::ptr_eq(found, export))
    }

    pub(super) fn credentials(&self) -> Option<&Arc<Credentials>> {
        self.options.credentials.as_ref()
    }

    /// Secures a client's connection, and lets in whom it may.
    pub(super) async fn secure(
        &self,
        connection: Connection,
        credentials: &Credentials,
    ) -> Result<Connection, String> {
        let secured = connection.accept_tls(credentials).await;
        let connection = secured.map_err(|error| error.to_string())?;
        let Some(authorization) = &self.options.authorization else {
            return Ok(connection);
        };
        let name = connection.peer_name().unwrap_or_default();
        match !name.is_empty() && authorization.allows(&name) {
            true => Ok(connection),
            false => Err(format!("TLS x509 authz check for {name} is denied")),
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<Rc<NbdExport>> {
        self.exports.borrow().get(name).cloned()
    }

    /// Name and description of every export.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        let exports = self.exports.borrow();
        let described = exports.values().map(|export| {
            let core = export.core();
            (
                core.name.clone(),
                core.description.clone().unwrap_or_default(),
            )
        });
        described.collect()
    }

    pub(super) fn several(&self) -> Several {
        match self.options.max_connections {
            Some(1) => Several::No,
            _ => Several::Clients,
        }
    }

    fn clients_of(&self, core: &Arc<Core>) -> usize {
        let clients = self.clients.borrow();
        clients.values().filter(|client| client.uses(core)).count()
    }

    /// Shuts the connections of an export's clients down; how many there are.
    fn close_clients_of(&self, core: &Arc<Core>) -> usize {
        let clients = self.clients.borrow();
        let users = clients.values().filter(|client| client.uses(core));
        users.map(|client| client.closer.shutdown()).count()
    }
}

impl Client {
    fn uses(&self, core: &Arc<Core>) -> bool {
        self.export
            .as_ref()
            .is_some_and(|used| Arc::ptr_eq(used, core))
    }
}
