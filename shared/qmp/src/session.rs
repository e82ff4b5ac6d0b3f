//! One client connection: greeting, negotiation, requests in, replies and events out.
//!
//! ```text
//!   new ── greeting ──> Negotiating ── qmp_capabilities ──> Ready
//! ```
//!
//! While negotiating every other command is refused and no event is sent. Requests come out in
//! order, one [`Session::next_request`] at a time; the errors of the session itself (malformed
//! input, negotiation) are queued with them and answered in their turn, so that a server that
//! finishes a request before it takes the next one answers in order.
//!
//! A server bounds memory by reading the socket only while [`Session::has_pending`] is false, and
//! by not letting output pile up behind a client that does not read.

use crate::json::{Layout, MAX_MESSAGE_BYTES, Stream, to_line};
use crate::{Arguments, Error, ErrorClass, Event, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;

/// Bytes of unsent output at which a client counts as not reading.
const MAX_OUTPUT_BYTES: usize = 2 * MAX_MESSAGE_BYTES;

/// What the greeting and `query-version` tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Version {
    /// The QEMU release whose commands and behaviour are offered.
    pub qemu: VersionTriple,
    /// The program and its own version.
    pub package: String,
}

/// A release number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct VersionTriple {
    /// Last part.
    pub micro: u32,
    /// Middle part.
    pub minor: u32,
    /// First part.
    pub major: u32,
}

impl Version {
    /// The version that every program here announces, with `package` as its own name and version.
    pub fn announced(package: impl Into<String>) -> Self {
        let (major, minor, micro) = (7, 2, 0);
        let qemu = VersionTriple {
            micro,
            minor,
            major,
        };
        let package = package.into();
        Self { qemu, package }
    }
}

/// How a session is set up.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// What to announce.
    pub version: Version,
    /// How replies and events are laid out.
    pub layout: Layout,
}

/// A command to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The word after `execute` or `exec-oob`.
    pub command: String,
    /// Its `arguments`, empty when absent.
    pub parameters: Map<String, Value>,
    /// Whether it came with `exec-oob`.
    pub out_of_band: bool,
    /// What the client wants to see in the reply.
    pub id: Option<Value>,
}

impl Request {
    /// The parameters, for a handler to take apart.
    pub fn arguments(&self) -> Arguments {
        Arguments::from_json(self.parameters.clone())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Negotiating,
    Ready { out_of_band: bool },
}

/// A client connection.
pub struct Session {
    stream: Stream,
    pending: VecDeque<Result<Value>>,
    phase: Phase,
    layout: Layout,
    output: Vec<u8>,
}

impl Session {
    /// A session whose output starts with the greeting.
    pub fn new(options: &SessionOptions) -> Self {
        let mut session = Self {
            stream: Stream::default(),
            pending: VecDeque::new(),
            phase: Phase::Negotiating,
            layout: options.layout,
            output: Vec::new(),
        };
        session.send(&json!({
            "QMP": { "version": options.version, "capabilities": ["oob"] },
        }));
        session
    }

    /// Takes bytes from the client.
    pub fn feed(&mut self, bytes: &[u8]) {
        let pending = &mut self.pending;
        self.stream
            .feed(bytes, &mut |message| pending.push_back(message));
    }

    /// Whether input waits for [`Session::next_request`].
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The next request to run; answers what the session itself can on the way there.
    pub fn next_request(&mut self) -> Option<Request> {
        while let Some(message) = self.pending.pop_front() {
            let mut id = None;
            match message.and_then(|message| self.admit(message, &mut id)) {
                Ok(Some(request)) => return Some(request),
                Ok(None) => self.reply(id, Ok(json!({}))),
                Err(error) => self.reply(id, Err(error)),
            }
        }
        None
    }

    /// Answers a request.
    pub fn reply(&mut self, id: Option<Value>, result: Result<Value>) {
        let mut message = Map::new();
        let failed = result.is_err();
        match result {
            Ok(value) => message.insert("return".into(), value),
            Err(error) => message.insert("error".into(), json!(error)),
        };
        if let Some(id) = id {
            let place = if failed { 0 } else { 1 };
            message.shift_insert(place, "id".into(), id);
        }
        self.send(&Value::Object(message));
    }

    /// Tells the client of `event`, once it has negotiated.
    pub fn event(&mut self, event: &Event) {
        if self.phase != Phase::Negotiating {
            self.send(&event.to_value());
        }
    }

    /// The bytes to send to the client since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Whether more output has piled up than a client that reads leaves; close it then.
    pub fn is_overrun(&self) -> bool {
        self.output.len() > MAX_OUTPUT_BYTES
    }

    fn send(&mut self, message: &Value) {
        self.output.extend(to_line(message, self.layout));
    }

    /// Checks the envelope; `None` when the session has done what was asked.
    fn admit(&mut self, message: Value, id: &mut Option<Value>) -> Result<Option<Request>> {
        let Value::Object(mut members) = message else {
            return Err(Error::generic("QMP input must be a JSON object"));
        };
        *id = members.shift_remove("id");
        let allow_out_of_band = self.phase == Phase::Ready { out_of_band: true };
        let mut request = parse_envelope(members, allow_out_of_band)?;
        request.id = id.clone();
        match (request.command.as_str(), self.phase) {
            ("qmp_capabilities", Phase::Negotiating) => {
                let enabled: Capabilities = request.arguments().parse()?;
                let out_of_band = enabled.enable.contains(&Capability::Oob);
                self.phase = Phase::Ready { out_of_band };
                Ok(None)
            }
            ("qmp_capabilities", Phase::Ready { .. }) => Err(Error::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            )),
            (_, Phase::Negotiating) => Err(Error::new(
                ErrorClass::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            _ => Ok(Some(request)),
        }
    }
}

#[derive(Deserialize)]
struct Capabilities {
    #[serde(default)]
    enable: Vec<Capability>,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Capability {
    Oob,
}

fn parse_envelope(members: Map<String, Value>, allow_out_of_band: bool) -> Result<Request> {
    let mut command = None;
    let mut out_of_band = false;
    let mut parameters = Map::new();
    for (key, value) in members {
        match key.as_str() {
            "execute" | "exec-oob" if key == "execute" || allow_out_of_band => {
                let Value::String(name) = value else {
                    let what = format!("QMP input member '{key}' must be a string");
                    return Err(Error::generic(what));
                };
                if command.replace(name).is_some() {
                    let what = "QMP input member 'execute' clashes with 'exec-oob'";
                    return Err(Error::generic(what));
                }
                out_of_band = key == "exec-oob";
            }
            "arguments" => {
                let Value::Object(given) = value else {
                    let what = "QMP input member 'arguments' must be an object";
                    return Err(Error::generic(what));
                };
                parameters = given;
            }
            _ => {
                let what = format!("QMP input member '{key}' is unexpected");
                return Err(Error::generic(what));
            }
        }
    }
    let Some(command) = command else {
        return Err(Error::generic("QMP input lacks member 'execute'"));
    };
    Ok(Request {
        command,
        parameters,
        out_of_band,
        id: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, CommandTable, SyncHandler};

    fn session() -> Session {
        let mut session = Session::new(&SessionOptions {
            version: Version::announced("p"),
            layout: Layout::OneLine,
        });
        let greeting = String::from_utf8(session.take_output()).unwrap();
        assert_eq!(
            greeting,
            "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 2, \"major\": 7}, \
             \"package\": \"p\"}, \"capabilities\": [\"oob\"]}}\r\n"
        );
        session
    }

    /// Runs `input` against a table of one command and gives what comes back.
    fn talk(session: &mut Session, input: &str) -> String {
        fn echo(_: &mut (), arguments: Arguments) -> Result<Value> {
            Ok(Value::Object(arguments.into_members()))
        }
        const COMMANDS: &[Command<SyncHandler<()>>] = &[Command {
            name: "echo",
            handler: echo,
        }];
        let table = CommandTable::new([COMMANDS]);
        session.feed(input.as_bytes());
        while let Some(request) = session.next_request() {
            let result = table.dispatch(&mut (), &request);
            session.reply(request.id, result);
        }
        let output = String::from_utf8(session.take_output()).unwrap();
        output.trim_end().to_owned()
    }

    fn negotiated() -> Session {
        let mut session = session();
        let reply = talk(&mut session, "{'execute':'qmp_capabilities','id':1}");
        assert_eq!(reply, r#"{"return": {}, "id": 1}"#);
        session
    }

    #[test]
    fn commands_wait_for_negotiation() {
        let mut session = session();
        assert_eq!(
            talk(&mut session, "{'execute':'echo'}"),
            r#"{"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}"#
        );
        session.event(&Event::new("RESET"));
        assert!(session.take_output().is_empty());
        let bad = "{'execute':'qmp_capabilities','arguments':{'enable':5}}";
        assert!(talk(&mut session, bad).contains("expected: array"));
        assert!(talk(&mut session, "{'execute':'qmp_capabilities'}").contains("return"));
        assert!(talk(&mut session, "{'execute':'qmp_capabilities'}").contains("already complete"));
        session.event(&Event::with_data("X", json!({"a": 1})));
        let event = String::from_utf8(session.take_output()).unwrap();
        assert!(
            event.starts_with(r#"{"timestamp": {"seconds": "#),
            "{event}"
        );
        assert!(
            event.ends_with("\"event\": \"X\", \"data\": {\"a\": 1}}\r\n"),
            "{event}"
        );
    }

    #[test]
    fn envelopes_are_checked_as_the_peer_does() {
        let mut session = negotiated();
        let class = r#"{"class": "GenericError", "desc": "#;
        for (input, desc) in [
            ("[1]", "QMP input must be a JSON object"),
            (
                "{'execute':5}",
                "QMP input member 'execute' must be a string",
            ),
            (
                "{'execute':'echo','foo':1}",
                "QMP input member 'foo' is unexpected",
            ),
            (
                "{'exec-oob':'echo'}",
                "QMP input member 'exec-oob' is unexpected",
            ),
            ("{}", "QMP input lacks member 'execute'"),
            (
                "{'execute':'echo','arguments':5}",
                "QMP input member 'arguments' must be an object",
            ),
        ] {
            let expected = format!("{{\"error\": {class}\"{desc}\"}}}}");
            assert_eq!(talk(&mut session, input), expected);
        }
        assert_eq!(
            talk(&mut session, "{'execute':'nope','id':5}"),
            r#"{"id": 5, "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}"#
        );
        assert_eq!(
            talk(
                &mut session,
                "{'execute':'echo','arguments':{'a':'b'},'id':{'x':[1]}}"
            ),
            r#"{"return": {"a": "b"}, "id": {"x": [1]}}"#
        );
    }

    #[test]
    fn out_of_band_needs_the_capability_and_a_command_that_allows_it() {
        let mut session = session();
        let enable = "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}";
        assert_eq!(talk(&mut session, enable), r#"{"return": {}}"#);
        let reply = talk(&mut session, "{'exec-oob':'echo'}");
        assert!(
            reply.contains("The command echo does not support OOB"),
            "{reply}"
        );
        let reply = talk(&mut session, "{'exec-oob':'echo','execute':'echo'}");
        assert!(reply.contains("clashes with 'exec-oob'"), "{reply}");
    }

    #[test]
    fn replies_keep_the_order_of_requests_and_malformed_input() {
        let mut session = negotiated();
        let replies = talk(
            &mut session,
            "{'execute':'echo','id':1} % {'execute':'echo','id':2}",
        );
        let lines: Vec<_> = replies.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].ends_with("\"id\": 1}") && lines[2].ends_with("\"id\": 2}"));
        assert!(lines[1].contains("stray '%'"));
    }
}
