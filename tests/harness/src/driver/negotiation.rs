//! The first messages on a connection, up to the number of queues.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Endpoint;
use super::features::bits;
use super::session::Session;
use crate::wire::{protocol_feature, request};

/// What the back-end said of itself.
#[derive(Debug)]
pub(crate) struct Greeting {
    /// The connection, with the protocol features in use.
    pub(crate) session: Session,
    /// Features that it offers.
    pub(crate) offered: u64,
    /// Answer to `GET_QUEUE_NUM`, 1 without it.
    pub(crate) max_queues: u64,
}

/// Connects, and takes those of the protocol features `wanted` that the back-end has. Every wait is bounded by `limit`.
pub(crate) fn negotiate(endpoint: &Endpoint, limit: Duration, wanted: u64) -> Result<Greeting> {
    let socket = endpoint.open(limit)?;
    socket
        .set_read_timeout(Some(limit))
        .context("read timeout")?;
    socket
        .set_write_timeout(Some(limit))
        .context("write timeout")?;
    let mut session = Session::new(socket);
    let offered = session.get(request::GET_FEATURES)?;
    ensure!(
        offered & bits::PROTOCOL_FEATURES != 0,
        "the back-end has no PROTOCOL_FEATURES"
    );
    let protocol = session.get(request::GET_PROTOCOL_FEATURES)? & wanted;
    session.set(request::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
    session.protocol = protocol;
    let max_queues = if protocol & protocol_feature::MQ != 0 {
        session.get(request::GET_QUEUE_NUM)?
    } else {
        1
    };
    session.send(request::SET_OWNER, &[])?;
    Ok(Greeting {
        session,
        offered,
        max_queues,
    })
}
