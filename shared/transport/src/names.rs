//! Addresses of hosts: the resolver is asked, which blocks, on a worker thread.
//!
//! A process that is about to lose its way to the resolver ([`freeze`]) goes on with the last answers.

use executor::workers;
use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most hosts whose last answer is kept.
const MAX_KEPT: usize = 1024;

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

#[derive(Default)]
struct Known {
    answers: HashMap<(String, u16), Vec<SocketAddr>>,
    frozen: bool,
}

fn known() -> MutexGuard<'static, Option<Known>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The addresses of `host`, which may be an address itself, with `port`.
///
/// # Errors
/// The resolver's reason.
pub async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let key = (host.to_owned(), port);
    let is_address = host.parse::<std::net::IpAddr>().is_ok();
    if let (
        Some(Known {
            answers,
            frozen: true,
        }),
        false,
    ) = (&*known(), is_address)
    {
        let answer = answers.get(&key).cloned();
        return answer.ok_or_else(|| "names are not resolved any more".to_owned());
    }
    let name = host.to_owned();
    let answer = workers::offload(move || ask(&name, port)).await?;
    let mut known = known();
    let answers = &mut known.get_or_insert_default().answers;
    if answers.len() < MAX_KEPT || answers.contains_key(&key) {
        answers.insert(key, answer.clone());
    }
    Ok(answer)
}

/// From now on the resolver is out of reach.
pub fn freeze() {
    known().get_or_insert_default().frozen = true;
}

fn ask(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let found = (host, port).to_socket_addrs().map_err(|error| {
        let text = error.to_string();
        let reason = text.rsplit(": ").next().unwrap_or(&text);
        reason.to_owned()
    });
    found.map(Iterator::collect)
}

#[cfg(test)]
mod tests {
    use super::*;
    use executor::{Config, Executor};

    /// One test, because it is about the process.
    #[test]
    fn the_last_answers_outlive_the_resolver() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let before = resolve("localhost", 1).await.unwrap();
            assert!(before.iter().all(|address| address.ip().is_loopback()));
            freeze();
            assert_eq!(resolve("localhost", 1).await, Ok(before));
            let unknown = resolve("localhost", 2).await.unwrap_err();
            assert_eq!(unknown, "names are not resolved any more");
            assert!(resolve("127.0.0.1", 2).await.is_ok());
        });
    }
}
