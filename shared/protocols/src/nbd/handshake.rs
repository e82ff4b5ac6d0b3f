//! The handshake: from a fresh connection to an export that takes requests.
//!
//! ```text
//!   greeting ─► [TLS] ─► extended headers | structured replies ─► metadata context ─► GO ─► transmission
//!                                                                                    └ (unknown) EXPORT_NAME
//! ```

use super::target::{Target, Tls};
use block::error::Result;
use block::{Buffer, Errno, Error, ErrorKind};
use executor::net::Part;
use nbd::{
    BASE_ALLOCATION, BlockSizes, ClientFlags, ClientOption, ErrorReply, ExportFlags, ExportInfo,
    ExportNameReply, ExportQuery, Greeting, HeaderStyle, InfoKind, MetaContextQuery,
    OldstyleExport, OptionKind, OptionReply, OptionReplyHeader, ProtocolError, ReplyErrorKind,
    ReplyStyle,
};
use transport::{Connection, TlsError};

/// Most replies to one option.
const MAX_REPLIES: usize = 4096;

/// Alignments above this are no alignments.
const MAX_MINIMUM: u32 = 64 << 10;

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreement {
    /// Length of the export in bytes.
    pub(super) size: u64,
    /// What it can do.
    pub(super) flags: ExportFlags,
    /// Sizes of requests, when the server told.
    pub(super) sizes: Option<BlockSizes>,
    /// How replies come.
    pub(super) replies: ReplyStyle,
    /// The number of the metadata context.
    pub(super) context: Option<u32>,
}

impl Agreement {
    pub(super) fn header_style(&self) -> HeaderStyle {
        match self.replies {
            ReplyStyle::Extended => HeaderStyle::Extended,
            _ => HeaderStyle::Compact,
        }
    }
}

fn broken(error: &ProtocolError) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("Failed to negotiate with the server: {error}"),
    )
}

fn violation(what: &str) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("Failed to negotiate with the server: {what}"),
    )
}

/// Whether a failed handshake is the connection's fault and may succeed on another one.
pub(super) fn is_worth_retrying(error: &Error) -> bool {
    error.errno.is_some()
}

/// Receives exactly `N` bytes.
pub(super) async fn receive<const N: usize>(
    connection: &Connection,
) -> std::result::Result<[u8; N], Errno> {
    let buffer = Buffer::zeroed(N);
    let received = connection.recv_exact(buffer.clone()).await?;
    if received < N {
        return Err(Errno::ECONNRESET);
    }
    let mut bytes = [0; N];
    bytes.copy_from_slice(&buffer.to_heap());
    Ok(bytes)
}

/// Receives `length` bytes, which the caller has bounded.
pub(super) async fn receive_vec(
    connection: &Connection,
    length: usize,
) -> std::result::Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(length);
    let received = connection.recv_exact(buffer.clone()).await?;
    match received < length {
        true => Err(Errno::ECONNRESET),
        false => Ok(buffer.to_heap().to_vec()),
    }
}

fn lost(errno: Errno) -> Error {
    Error::io("Failed to negotiate with the server", errno)
}

/// What a server greets with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Greeted {
    /// It shows one export, and takes no options.
    Oldstyle,
    /// It takes a name, and options when it is `fixed`.
    Newstyle { fixed: bool, no_zeroes: bool },
}

/// One handshake.
struct Handshake<'h> {
    connection: &'h Connection,
    target: &'h Target,
}

/// Agrees with the server on the export of `target`, over TLS when the target asks for it.
///
/// # Errors
/// `Io` with an errno when the connection is lost; otherwise the server's refusal, or why it is not trusted.
pub(super) async fn run(
    connection: Connection,
    target: &Target,
) -> Result<(Connection, Agreement)> {
    let first = Handshake {
        connection: &connection,
        target,
    };
    let greeted = first.greet().await?;
    let connection = match (&target.tls, greeted) {
        (None, _) => connection,
        (Some(tls), Greeted::Newstyle { fixed: true, .. }) => {
            first.start_tls().await?;
            secure(connection, tls).await?
        }
        // Nothing is said to a server that cannot be asked for TLS.
        (Some(_), _) => return Err(violation("Server does not support STARTTLS")),
    };
    let handshake = Handshake {
        connection: &connection,
        target,
    };
    let agreement = match greeted {
        Greeted::Oldstyle => handshake.oldstyle().await?,
        Greeted::Newstyle { fixed, no_zeroes } => match fixed {
            true => handshake.options(no_zeroes).await?,
            false => {
                let replies = ReplyStyle::Simple;
                handshake.export_name(no_zeroes, replies).await?
            }
        },
    };
    Ok((connection, agreement))
}

async fn secure(connection: Connection, tls: &Tls) -> Result<Connection> {
    let secured = connection.connect_tls(&tls.credentials, tls.hostname.as_deref());
    let refused = |error: TlsError| Error::new(ErrorKind::Io, error.to_string());
    secured.await.map_err(refused)
}

impl Handshake<'_> {
    async fn greet(&self) -> Result<Greeted> {
        let magic = receive::<{ Greeting::MAGIC_SIZE }>(self.connection)
            .await
            .map_err(lost)?;
        if !Greeting::decode_magic(&magic).map_err(|error| broken(&error))? {
            return Ok(Greeted::Oldstyle);
        }
        let flags = receive::<{ Greeting::FLAGS_SIZE }>(self.connection)
            .await
            .map_err(lost)?;
        let Greeting::Newstyle { fixed, no_zeroes } = Greeting::decode_flags(flags) else {
            return Err(violation("an impossible greeting"));
        };
        let answer = ClientFlags { fixed, no_zeroes };
        self.send(answer.encode().to_vec()).await?;
        Ok(Greeted::Newstyle { fixed, no_zeroes })
    }

    /// Asks for TLS; the server waits for the handshake when this is over.
    async fn start_tls(&self) -> Result<()> {
        let option = ClientOption::StartTls;
        let kind = option.kind();
        self.send(option.encode()).await?;
        match self.reply(kind).await? {
            OptionReply::Ack => Ok(()),
            OptionReply::Error(error) => Err(refused(kind, &error)),
            _ => Err(violation("an unexpected reply")),
        }
    }

    async fn send(&self, bytes: Vec<u8>) -> Result<()> {
        let sent = self.connection.send(vec![Part::Bytes(bytes)]).await;
        sent.map_err(lost)
    }

    async fn oldstyle(&self) -> Result<Agreement> {
        if !self.target.export.is_empty() {
            return Err(violation("Server does not support non-empty export names"));
        }
        let rest = receive::<{ OldstyleExport::SIZE }>(self.connection)
            .await
            .map_err(lost)?;
        let export = OldstyleExport::decode(&rest).map_err(|error| broken(&error))?;
        Ok(Agreement {
            size: export.size,
            flags: export.flags,
            sizes: None,
            replies: ReplyStyle::Simple,
            context: None,
        })
    }

    async fn options(&self, no_zeroes: bool) -> Result<Agreement> {
        let replies = if self.accepts(ClientOption::ExtendedHeaders).await? {
            ReplyStyle::Extended
        } else if self.accepts(ClientOption::StructuredReply).await? {
            ReplyStyle::Structured
        } else {
            ReplyStyle::Simple
        };
        let context = match replies {
            ReplyStyle::Simple => None,
            _ => self.metadata_context().await?,
        };
        match self.go(replies, context).await? {
            Some(agreement) => Ok(agreement),
            None => self.export_name(no_zeroes, replies).await,
        }
    }

    /// The next reply to `option`.
    async fn reply(&self, option: OptionKind) -> Result<OptionReply> {
        let head = receive::<{ OptionReplyHeader::SIZE }>(self.connection)
            .await
            .map_err(lost)?;
        let head = OptionReplyHeader::decode(&head).map_err(|error| broken(&error))?;
        if head.option != option {
            return Err(violation("a reply to an option that was not sent"));
        }
        let data = receive_vec(self.connection, head.length as usize)
            .await
            .map_err(lost)?;
        OptionReply::decode(&head, &data).map_err(|error| broken(&error))
    }

    /// Whether the server agrees to an option without data.
    async fn accepts(&self, option: ClientOption) -> Result<bool> {
        let kind = option.kind();
        self.send(option.encode()).await?;
        match self.reply(kind).await? {
            OptionReply::Ack => Ok(true),
            OptionReply::Error(error) if is_skippable(&error) => Ok(false),
            OptionReply::Error(error) => Err(refused(kind, &error)),
            _ => Err(violation("an unexpected reply")),
        }
    }

    /// The number of the context that extents are asked for.
    async fn metadata_context(&self) -> Result<Option<u32>> {
        let wanted = self
            .target
            .dirty_bitmap
            .as_deref()
            .unwrap_or(BASE_ALLOCATION);
        let option = ClientOption::SetMetaContext(MetaContextQuery {
            export: self.target.export.clone(),
            queries: vec![wanted.to_owned()],
        });
        let kind = option.kind();
        self.send(option.encode()).await?;
        let mut found = None;
        for _ in 0..MAX_REPLIES {
            match self.reply(kind).await? {
                OptionReply::Ack => return Ok(found),
                OptionReply::MetaContext { id, name } if name == wanted => found = Some(id),
                OptionReply::MetaContext { name, .. } => {
                    let message = format!(
                        "Failed to negotiate query '{wanted}', server answered with different context '{name}'"
                    );
                    return Err(Error::new(ErrorKind::Io, message));
                }
                OptionReply::Error(error) if is_skippable(&error) => return Ok(None),
                OptionReply::Error(error) => return Err(refused(kind, &error)),
                _ => return Err(violation("an unexpected reply")),
            }
        }
        Err(violation("too many replies"))
    }

    /// Enters transmission; `None` when the server does not know how.
    async fn go(&self, replies: ReplyStyle, context: Option<u32>) -> Result<Option<Agreement>> {
        let option = ClientOption::Go(ExportQuery {
            name: self.target.export.clone(),
            infos: vec![InfoKind::BlockSize],
        });
        let kind = option.kind();
        self.send(option.encode()).await?;
        let (mut export, mut sizes) = (None, None);
        for _ in 0..MAX_REPLIES {
            match self.reply(kind).await? {
                OptionReply::Ack => {
                    let Some((size, flags)) = export else {
                        return Err(violation("the server does not tell the export's size"));
                    };
                    return Ok(Some(Agreement {
                        size,
                        flags,
                        sizes,
                        replies,
                        context,
                    }));
                }
                OptionReply::Info(ExportInfo::Export { size, flags }) => {
                    export = Some((size, flags))
                }
                OptionReply::Info(ExportInfo::BlockSize(told)) => sizes = Some(checked(told)?),
                OptionReply::Info(_) | OptionReply::Unknown(_) => {}
                OptionReply::Error(error) if error.kind == ReplyErrorKind::Unsupported => {
                    return Ok(None);
                }
                OptionReply::Error(error) => return Err(refused(kind, &error)),
                _ => return Err(violation("an unexpected reply")),
            }
        }
        Err(violation("too many replies"))
    }

    /// Enters transmission the old way, in which a refusal is a closed connection.
    async fn export_name(&self, no_zeroes: bool, replies: ReplyStyle) -> Result<Agreement> {
        let option = ClientOption::ExportName(self.target.export.clone());
        self.send(option.encode()).await?;
        let head = receive::<{ ExportNameReply::SIZE }>(self.connection)
            .await
            .map_err(lost)?;
        let export = ExportNameReply::decode(&head).map_err(|error| broken(&error))?;
        if !no_zeroes {
            receive::<{ ExportNameReply::PADDING }>(self.connection)
                .await
                .map_err(lost)?;
        }
        Ok(Agreement {
            size: export.size,
            flags: export.flags,
            sizes: None,
            replies,
            context: None,
        })
    }
}

/// A server without an option is no reason to give up.
fn is_skippable(error: &ErrorReply) -> bool {
    matches!(
        error.kind,
        ReplyErrorKind::Unsupported | ReplyErrorKind::Policy | ReplyErrorKind::Invalid
    ) || matches!(error.kind, ReplyErrorKind::UnknownExport)
}

fn checked(sizes: BlockSizes) -> Result<BlockSizes> {
    let BlockSizes {
        minimum,
        preferred,
        maximum,
    } = sizes;
    let good = minimum.is_power_of_two()
        && minimum <= MAX_MINIMUM
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum >= minimum;
    match good {
        true => Ok(sizes),
        false => Err(violation("the server's block sizes contradict each other")),
    }
}

/// A refusal in the words of the peer, with those of the server as advice.
fn refused(option: OptionKind, error: &ErrorReply) -> Error {
    let which = format!("option {} ({})", option.to_wire(), option.name());
    let message = match error.kind {
        ReplyErrorKind::Unsupported => format!("Unsupported {which}"),
        ReplyErrorKind::Policy => format!("Denied by server for {which}"),
        ReplyErrorKind::Invalid => format!("Invalid parameters for {which}"),
        ReplyErrorKind::Platform => format!("Server lacks support for {which}"),
        ReplyErrorKind::TlsRequired => format!("Server requires TLS for {which}"),
        ReplyErrorKind::UnknownExport => "Requested export not available".to_owned(),
        ReplyErrorKind::Shutdown => format!("Server shutting down before {which}"),
        ReplyErrorKind::BlockSizeRequired => format!("Server requires INFO_BLOCK_SIZE for {which}"),
        _ => format!("Unknown error code when asking for {which}"),
    };
    let result = Error::new(ErrorKind::Io, message);
    match (error.kind, error.message.is_empty()) {
        (ReplyErrorKind::TlsRequired, _) => result.with_hint("Did you forget a valid tls-creds?"),
        (_, true) => result,
        // What a server says is shown without anything that could steer a terminal.
        (_, false) => {
            let said: String = error.message.chars().filter(|c| !c.is_control()).collect();
            result.with_hint(format!("server reported: {said}"))
        }
    }
}
