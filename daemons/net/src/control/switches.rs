//! `query-switch`: what switches know.

use std::rc::Rc;

use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use super::Netd;

#[derive(Deserialize)]
struct Which {
    #[serde(default)]
    id: Option<String>,
}

/// The stations that a switch knows, or those of all switches.
pub(super) async fn query(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Which { id } = arguments.parse()?;
    let entries = match &id {
        Some(id) => vec![netd.netdev(id)?],
        None => netd.netdevs.borrow().clone(),
    };
    let mut switches = Vec::new();
    for entry in entries {
        let netdev = entry.netdev();
        match netdev.switch() {
            Some(switch) => {
                let stations = switch.stations().await;
                switches.push(json!({ "id": entry.id(), "stations": stations }));
            }
            None if id.is_some() => {
                let what = format!("netdev '{}' is not a switch", entry.id());
                return Err(Error::generic(what));
            }
            None => {}
        }
    }
    Ok(switches.into())
}
