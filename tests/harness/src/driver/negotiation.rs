//! The first messages on a connection, up to the configuration space, and request-reply exchanges.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::features::{BlockConfig, CONFIG_BYTES, bits};
use super::{Endpoint, Options};
use crate::wire::{self, flag, protocol_feature, request};

/// What the back-end said of itself.
pub(super) struct Greeting {
    pub(super) offered: u64,
    pub(super) protocol: u64,
    pub(super) max_queues: u64,
    pub(super) config: BlockConfig,
}

/// A connection whose every wait is bounded by `limit`.
pub(super) fn open_socket(endpoint: &Endpoint, limit: Duration) -> Result<UnixStream> {
    let socket = endpoint.open(limit)?;
    socket
        .set_read_timeout(Some(limit))
        .context("read timeout")?;
    socket
        .set_write_timeout(Some(limit))
        .context("write timeout")?;
    Ok(socket)
}

/// Everything up to and including the configuration space.
pub(super) fn negotiate(socket: &UnixStream, options: &Options) -> Result<Greeting> {
    let offered = get(socket, request::GET_FEATURES)?;
    ensure!(
        offered & bits::PROTOCOL_FEATURES != 0,
        "the back-end has no PROTOCOL_FEATURES"
    );
    let protocol = get(socket, request::GET_PROTOCOL_FEATURES)? & options.protocol;
    ensure!(
        protocol & protocol_feature::CONFIG != 0,
        "the back-end has no CONFIG"
    );
    let header = (request::SET_PROTOCOL_FEATURES, 0);
    wire::send(socket, header, &protocol.to_le_bytes(), &[])?;
    let max_queues = if protocol & protocol_feature::MQ != 0 {
        get(socket, request::GET_QUEUE_NUM)?
    } else {
        1
    };
    wire::send(socket, (request::SET_OWNER, 0), &[], &[])?;
    let config = get_config(socket)?;
    Ok(Greeting {
        offered,
        protocol,
        max_queues,
        config,
    })
}

/// A request without arguments and its `u64` answer.
pub(super) fn get(socket: &UnixStream, number: u32) -> Result<u64> {
    wire::send(socket, (number, 0), &[], &[]).with_context(|| format!("sending {number}"))?;
    let body = reply_to(socket, number)?;
    ensure!(
        body.len() == 8,
        "request {number} answered with {} bytes",
        body.len()
    );
    Ok(wire::read_u64(&body, 0))
}

/// The configuration space.
pub(super) fn get_config(socket: &UnixStream) -> Result<BlockConfig> {
    let mut body = [0, CONFIG_BYTES as u32, 0].map(u32::to_le_bytes).concat();
    body.resize(12 + CONFIG_BYTES, 0);
    wire::send(socket, (request::GET_CONFIG, 0), &body, &[])?;
    let reply = reply_to(socket, request::GET_CONFIG)?;
    ensure!(
        reply.len() >= 12,
        "GET_CONFIG answered with {} bytes",
        reply.len()
    );
    BlockConfig::decode(&reply[12..])
}

/// Body of the reply to request `number`.
pub(super) fn reply_to(socket: &UnixStream, number: u32) -> Result<Vec<u8>> {
    let reply = wire::receive(socket).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no reply in time"),
        _ => error,
    });
    let reply = reply.with_context(|| format!("reply to request {number}"))?;
    ensure!(
        reply.request == number,
        "reply to {} instead of {number}",
        reply.request
    );
    ensure!(
        reply.flags & flag::REPLY != 0,
        "request {number}: flags {:#x}",
        reply.flags
    );
    Ok(reply.body)
}
