//! The server's side of the handshake.
//!
//! ```text
//!   greeting ─► client's flags ─► options ──┬─ GO, EXPORT_NAME ─► transmission
//!                                    ▲   │  └─ ABORT, end of stream ─► over
//!                                    └───┘ answered
//! ```
//!
//! An option that makes no sense is answered with an error, in QEMU's words; bytes that are no option end the connection.

use super::export::{Context, NbdExport};
use super::server::State;
use ::nbd::limits::MAX_DECODED_OPTION;
use ::nbd::{
    ClientFlags, ClientOption, ErrorReply, ExportInfo, ExportNameReply, ExportQuery, Greeting,
    HeaderStyle, InfoKind, MetaContextQuery, OptionHeader, OptionKind, OptionReply, ReplyErrorKind,
    ReplyStyle,
};
use executor::Buffer;
use executor::net::Part;
use std::rc::Rc;
use std::sync::Arc;
use transport::{Connection, Credentials};

/// Options that a client may send: more than any that is in earnest.
const MAX_OPTIONS: u32 = 4096;
/// Data of an option that is too long to be decoded is dropped in pieces of this size.
const SKIP: usize = 64 << 10;

/// What the sides agreed on, for the transmission phase.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) replies: ReplyStyle,
    /// The contexts that were chosen, and their numbers.
    pub(super) contexts: Vec<(Context, u32)>,
    /// The client knows the block sizes, and keeps to them.
    pub(super) keeps_blocks: bool,
}

impl Terms {
    pub(super) fn headers(&self) -> HeaderStyle {
        match self.replies {
            ReplyStyle::Simple | ReplyStyle::Structured => HeaderStyle::Compact,
            ReplyStyle::Extended => HeaderStyle::Extended,
        }
    }
}

/// What a handshake ended with.
pub(super) struct Agreed {
    pub(super) export: Rc<NbdExport>,
    pub(super) terms: Terms,
}

/// What follows an option.
enum Next {
    Option,
    /// A handshake of TLS, and options again.
    Tls(Arc<Credentials>),
    Transmission(Rc<NbdExport>),
    Over,
}

/// One client's handshake.
struct Handshake<'a> {
    connection: Connection,
    server: &'a State,
    flags: ClientFlags,
    terms: Terms,
    /// The export that the contexts were chosen for.
    contexts_of: Option<Rc<NbdExport>>,
}

/// Leads a client to its export. `None` when it leaves before.
///
/// # Errors
/// What the client or the connection did wrong.
pub(super) async fn negotiate(
    connection: Connection,
    server: &State,
) -> Result<Option<(Connection, Agreed)>, String> {
    send(&connection, Greeting::encode().to_vec()).await?;
    let Some(flags) = receive(&connection, ClientFlags::SIZE).await? else {
        return Ok(None);
    };
    let flags = flags.try_into().map_err(|_| "short flags".to_owned())?;
    let flags = ClientFlags::decode(flags).map_err(|error| error.to_string())?;
    let mut handshake = Handshake::new(connection, server, flags);
    for _ in 0..MAX_OPTIONS {
        let Some(header) = receive(&handshake.connection, OptionHeader::SIZE).await? else {
            return Ok(None);
        };
        match handshake.option(&header).await? {
            Next::Option => {}
            Next::Tls(credentials) => {
                // Nothing that was said before counts: anybody may have said it.
                let secured = server.secure(handshake.connection, &credentials).await?;
                handshake = Handshake::new(secured, server, flags);
            }
            Next::Over => return Ok(None),
            Next::Transmission(export) => {
                let Handshake {
                    connection,
                    mut terms,
                    contexts_of,
                    ..
                } = handshake;
                if !contexts_of.is_some_and(|chosen| Rc::ptr_eq(&chosen, &export)) {
                    terms.contexts.clear();
                }
                return Ok(Some((connection, Agreed { export, terms })));
            }
        }
    }
    Err("too many options".to_owned())
}

async fn send(connection: &Connection, bytes: Vec<u8>) -> Result<(), String> {
    let sent = connection.send(vec![Part::Bytes(bytes)]).await;
    sent.map_err(|errno| format!("cannot send: {}", block::error::reason(errno)))
}

/// Receives `length` bytes; `None` when the stream ends before the first.
async fn receive(connection: &Connection, length: usize) -> Result<Option<Vec<u8>>, String> {
    let buffer = Buffer::zeroed(length);
    match connection.recv_exact(buffer.clone()).await {
        Ok(0) if length > 0 => Ok(None),
        Ok(count) if count == length => Ok(Some(buffer.to_heap().to_vec())),
        Ok(_) => Err("unexpected end of stream".to_owned()),
        Err(errno) => Err(format!("cannot receive: {}", block::error::reason(errno))),
    }
}

impl<'a> Handshake<'a> {
    fn new(connection: Connection, server: &'a State, flags: ClientFlags) -> Self {
        Self {
            connection,
            server,
            flags,
            terms: Terms {
                replies: ReplyStyle::Simple,
                contexts: Vec::new(),
                keeps_blocks: false,
            },
            contexts_of: None,
        }
    }

    async fn option(&mut self, header: &[u8]) -> Result<Next, String> {
        let header = header.try_into().map_err(|_| "short option".to_owned())?;
        let header = OptionHeader::decode(header).map_err(|error| error.to_string())?;
        let kind = header.kind;
        if !self.flags.fixed && kind != OptionKind::ExportName {
            return Err(format!(
                "Unsupported option {:#x} of a client that is not fixed newstyle",
                kind.to_wire()
            ));
        }
        if header.length > MAX_DECODED_OPTION {
            self.skip(header.length as usize).await?;
            return self.refuse(kind, ReplyErrorKind::TooBig, "").await;
        }
        let data = receive(&self.connection, header.length as usize).await?;
        let Some(data) = data.or((header.length == 0).then(Vec::new)) else {
            return Err("unexpected end of stream".to_owned());
        };
        let unsecured = self.server.credentials().is_some() && !self.connection.is_secure();
        if unsecured && !matches!(kind, OptionKind::StartTls | OptionKind::Abort) {
            let message = format!("Option {:#x} not permitted before TLS", kind.to_wire());
            return match kind {
                OptionKind::ExportName => Err(message),
                _ => {
                    self.refuse(kind, ReplyErrorKind::TlsRequired, &message)
                        .await
                }
            };
        }
        match ClientOption::decode(kind, &data) {
            Ok(option) => self.answer(option).await,
            Err(error) if kind == OptionKind::ExportName => Err(error.to_string()),
            Err(error) => {
                let message = match kind {
                    OptionKind::List
                    | OptionKind::StartTls
                    | OptionKind::StructuredReply
                    | OptionKind::ExtendedHeaders => {
                        format!("option '{}' has unexpected length", kind.name())
                    }
                    _ => error.to_string(),
                };
                self.refuse(kind, ReplyErrorKind::Invalid, &message).await
            }
        }
    }

    async fn answer(&mut self, option: ClientOption) -> Result<Next, String> {
        let kind = option.kind();
        match option {
            ClientOption::ExportName(name) => self.export_name(&name).await,
            ClientOption::Abort => {
                // The client may have gone without waiting for it.
                let _ = self.reply(kind, OptionReply::Ack).await;
                Ok(Next::Over)
            }
            ClientOption::List => {
                for (name, description) in self.server.list() {
                    let reply = OptionReply::Server { name, description };
                    self.reply(kind, reply).await?;
                }
                self.acknowledge(kind).await
            }
            ClientOption::StartTls => self.start_tls(kind).await,
            ClientOption::Info(query) | ClientOption::Go(query) => self.info(kind, query).await,
            ClientOption::StructuredReply => self.structured(kind).await,
            ClientOption::ExtendedHeaders => {
                if self.terms.replies == ReplyStyle::Extended {
                    let message = "extended headers already negotiated";
                    return self.refuse(kind, ReplyErrorKind::Invalid, message).await;
                }
                self.terms.replies = ReplyStyle::Extended;
                self.acknowledge(kind).await
            }
            ClientOption::ListMetaContext(query) | ClientOption::SetMetaContext(query) => {
                self.meta_contexts(kind, query).await
            }
            ClientOption::Unknown(number) => {
                let message = format!("Unsupported option {number} ({})", kind.name());
                self.refuse(kind, ReplyErrorKind::Unsupported, &message)
                    .await
            }
        }
    }

    async fn start_tls(&self, kind: OptionKind) -> Result<Next, String> {
        if self.connection.is_secure() {
            let message = "TLS already enabled";
            return self.refuse(kind, ReplyErrorKind::Invalid, message).await;
        }
        let Some(credentials) = self.server.credentials() else {
            let message = "TLS not configured";
            return self.refuse(kind, ReplyErrorKind::Policy, message).await;
        };
        self.reply(kind, OptionReply::Ack).await?;
        Ok(Next::Tls(Arc::clone(credentials)))
    }

    async fn structured(&mut self, kind: OptionKind) -> Result<Next, String> {
        match self.terms.replies {
            ReplyStyle::Simple => {
                self.terms.replies = ReplyStyle::Structured;
                self.acknowledge(kind).await
            }
            ReplyStyle::Structured => {
                let message = "structured reply already negotiated";
                self.refuse(kind, ReplyErrorKind::Invalid, message).await
            }
            ReplyStyle::Extended => {
                let message = "extended headers already negotiated";
                self.refuse(kind, ReplyErrorKind::ExtendedHeadersRequired, message)
                    .await
            }
        }
    }

    async fn export_name(&mut self, name: &str) -> Result<Next, String> {
        let Some(export) = self.server.find(name) else {
            return Err(format!("export '{name}' not found"));
        };
        let core = export.core();
        let reply = ExportNameReply {
            size: core.size(),
            flags: core.flags(self.server.several()),
        };
        let mut bytes = reply.encode().to_vec();
        if !self.flags.no_zeroes {
            bytes.resize(bytes.len() + ExportNameReply::PADDING, 0);
        }
        send(&self.connection, bytes).await?;
        Ok(Next::Transmission(export))
    }

    async fn info(&mut self, kind: OptionKind, query: ExportQuery) -> Result<Next, String> {
        let Some(export) = self.server.find(&query.name) else {
            return self.no_export(kind, &query.name).await;
        };
        let core = export.core();
        let asked = |info| query.infos.contains(&info);
        let mut infos = Vec::new();
        if asked(InfoKind::Name) {
            infos.push(ExportInfo::Name(core.name.clone()));
        }
        infos.extend(core.description.clone().map(ExportInfo::Description));
        let mut sizes = core.block_sizes();
        let required = sizes.minimum > 1;
        self.terms.keeps_blocks = asked(InfoKind::BlockSize);
        if kind == OptionKind::Go && !self.terms.keeps_blocks {
            // Such a client is served whatever it asks for.
            sizes.minimum = 1;
        }
        infos.push(ExportInfo::BlockSize(sizes));
        infos.push(ExportInfo::Export {
            size: core.size(),
            flags: core.flags(self.server.several()),
        });
        for info in infos {
            self.reply(kind, OptionReply::Info(info)).await?;
        }
        if kind == OptionKind::Info && required && !self.terms.keeps_blocks {
            let message = "request NBD_INFO_BLOCK_SIZE to use this export";
            return self
                .refuse(kind, ReplyErrorKind::BlockSizeRequired, message)
                .await;
        }
        self.reply(kind, OptionReply::Ack).await?;
        match kind {
            OptionKind::Go => Ok(Next::Transmission(export)),
            _ => Ok(Next::Option),
        }
    }

    async fn meta_contexts(
        &mut self,
        kind: OptionKind,
        query: MetaContextQuery,
    ) -> Result<Next, String> {
        if self.terms.replies == ReplyStyle::Simple {
            let message = format!(
                "request option '{}' when structured reply is not negotiated",
                kind.name()
            );
            return self.refuse(kind, ReplyErrorKind::Invalid, &message).await;
        }
        let setting = kind == OptionKind::SetMetaContext;
        if setting {
            self.terms.contexts.clear();
            self.contexts_of = None;
        }
        let Some(export) = self.server.find(&query.export) else {
            return self.no_export(kind, &query.export).await;
        };
        let all = export.core().contexts();
        let listing_all = !setting && query.queries.is_empty();
        let mut chosen = Vec::new();
        for (context, id, name) in all {
            let fits = |asked: &String| {
                *asked == name || (!setting && name.starts_with(asked) && asked.ends_with(':'))
            };
            if listing_all || query.queries.iter().any(fits) {
                chosen.push((context, id));
                self.reply(kind, OptionReply::MetaContext { id, name })
                    .await?;
            }
        }
        if setting {
            self.terms.contexts = chosen;
            self.contexts_of = Some(export);
        }
        self.acknowledge(kind).await
    }

    async fn no_export(&self, kind: OptionKind, name: &str) -> Result<Next, String> {
        let message = format!("export '{name}' not present");
        self.refuse(kind, ReplyErrorKind::UnknownExport, &message)
            .await
    }

    async fn refuse(
        &self,
        option: OptionKind,
        kind: ReplyErrorKind,
        message: &str,
    ) -> Result<Next, String> {
        let mut message = message.to_owned();
        let mut end = message.len().min(::nbd::limits::MAX_STRING);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        self.reply(option, OptionReply::Error(ErrorReply { kind, message }))
            .await?;
        Ok(Next::Option)
    }

    async fn acknowledge(&self, option: OptionKind) -> Result<Next, String> {
        self.reply(option, OptionReply::Ack).await?;
        Ok(Next::Option)
    }

    async fn reply(&self, option: OptionKind, reply: OptionReply) -> Result<(), String> {
        send(&self.connection, reply.encode(option)).await
    }

    async fn skip(&self, length: usize) -> Result<(), String> {
        let mut left = length;
        while left > 0 {
            let piece = left.min(SKIP);
            if receive(&self.connection, piece).await?.is_none() {
                return Err("unexpected end of stream".to_owned());
            }
            left -= piece;
        }
        Ok(())
    }
}
