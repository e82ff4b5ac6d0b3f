//! `group-add`, `group-del`, `set-group-rate`, `query-groups`: rates that ports share.

use std::rc::Rc;
use std::sync::Arc;

use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use super::Netd;
use crate::limit::{Group, RateOptions};

/// A group by id.
pub(super) struct GroupEntry {
    id: String,
    group: Arc<Group>,
}

#[derive(Deserialize)]
struct Identity {
    id: String,
}

impl Netd {
    /// The group `id`.
    pub(super) fn group(&self, id: &str) -> Result<Arc<Group>> {
        let groups = self.groups.borrow();
        let found = groups.iter().find(|entry| entry.id == id);
        found
            .map(|entry| Arc::clone(&entry.group))
            .ok_or_else(|| not_found(id))
    }

    /// The ports that share the group `id`.
    fn members(&self, id: &str) -> Vec<String> {
        let ports = self.ports.borrow();
        let members = ports.iter().filter(|port| port.is_in_group(id));
        members.map(|port| port.id().to_owned()).collect()
    }
}

fn not_found(id: &str) -> Error {
    Error::generic(format!("group '{id}' not found"))
}

/// The rate of a group, with its id taken off.
fn parse(mut arguments: Arguments) -> Result<(String, RateOptions)> {
    let Identity { id } = arguments.take()?;
    let rate: RateOptions = arguments.parse()?;
    let checked = rate.check();
    checked.map_err(|error| Error::generic(error.to_string()))?;
    Ok((id, rate))
}

pub(super) async fn add(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let (id, rate) = parse(arguments)?;
    if !qmp::is_identifier(&id) {
        return Err(Error::parameter_expects("id", "an identifier"));
    }
    if netd.group(&id).is_ok() {
        return Err(Error::generic(format!("group '{id}' already exists")));
    }
    let group = Arc::new(Group::new(&rate));
    netd.groups.borrow_mut().push(GroupEntry { id, group });
    Ok(json!({}))
}

pub(super) async fn del(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.parse()?;
    netd.group(&id)?;
    if let Some(port) = netd.members(&id).first() {
        return Err(Error::generic(format!(
            "group '{id}' is in use by port '{port}'"
        )));
    }
    netd.groups.borrow_mut().retain(|entry| entry.id != id);
    Ok(json!({}))
}

pub(super) async fn set_rate(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let (id, rate) = parse(arguments)?;
    netd.group(&id)?.set(&rate);
    Ok(json!({}))
}

pub(super) async fn query(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let groups = netd.groups.borrow();
    let described = groups.iter().map(|entry| {
        json!({
            "id": entry.id,
            "rate": entry.group.rate(),
            "ports": netd.members(&entry.id),
        })
    });
    Ok(described.collect())
}
