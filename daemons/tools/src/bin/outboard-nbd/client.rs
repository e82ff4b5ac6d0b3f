//! The client's side of a handshake: for the list of exports, and for the kernel's client.

use executor::net::Part;
use executor::{Buffer, Errno};
use nbd::{
    BlockSizes, ClientFlags, ClientOption, ErrorReply, ExportFlags, ExportInfo, ExportQuery,
    Greeting, InfoKind, MetaContextQuery, OldstyleExport, OptionKind, OptionReply,
    OptionReplyHeader, ProtocolError, ReplyErrorKind,
};
use tools::failure::Failure;
use transport::{Connection, Credentials};

/// The most exports, and contexts of one, that are listed.
const MAX_LISTED: usize = 10_000;

/// What is known of an export.
#[derive(Clone, Debug, Default)]
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) size: u64,
    /// Empty when the server does not tell.
    pub(crate) flags: ExportFlags,
    pub(crate) block_sizes: Option<BlockSizes>,
    pub(crate) contexts: Vec<String>,
}

/// A server that was greeted.
pub(crate) struct Client {
    connection: Connection,
    structured: bool,
}

/// What a greeting leads to.
pub(crate) enum Greeted {
    /// Options can be negotiated.
    Options(Client),
    /// An old server with one export.
    Oldstyle(Export),
}

fn received(error: Errno) -> Failure {
    let reason = block::error::reason(error);
    Failure::message(format!("Failed to read data: {reason}"))
}

fn malformed(error: ProtocolError) -> Failure {
    Failure::message(error.to_string())
}

fn refused(option: OptionKind, error: &ErrorReply) -> Failure {
    let mut message = error.describe(option);
    if let Some(hint) = error.hint() {
        message = format!("{message}\n{hint}");
    }
    Failure::message(message)
}

impl Client {
    /// Greets a server.
    pub(crate) async fn greet(connection: Connection) -> Result<Greeted, Failure> {
        let client = Self {
            connection,
            structured: false,
        };
        let magic: [u8; Greeting::MAGIC_SIZE] = client.fixed().await?;
        if !Greeting::decode_magic(&magic).map_err(malformed)? {
            let rest: [u8; OldstyleExport::SIZE] = client.fixed().await?;
            let export = OldstyleExport::decode(&rest).map_err(malformed)?;
            return Ok(Greeted::Oldstyle(Export {
                size: export.size,
                flags: export.flags.with(ExportFlags::HAS_FLAGS),
                ..Export::default()
            }));
        }
        let flags: [u8; Greeting::FLAGS_SIZE] = client.fixed().await?;
        let Greeting::Newstyle { fixed, no_zeroes } = Greeting::decode_flags(flags) else {
            return Err(Failure::message("Bad server flags"));
        };
        if !fixed {
            return Err(Failure::message("Server does not support the option LIST"));
        }
        let flags = ClientFlags { fixed, no_zeroes };
        client.send(flags.encode().to_vec()).await?;
        Ok(Greeted::Options(client))
    }

    /// Goes on over TLS.
    pub(crate) async fn secure(
        mut self,
        credentials: &Credentials,
        hostname: Option<&str>,
    ) -> Result<Self, Failure> {
        let replies = self.ask(&ClientOption::StartTls).await?;
        if let Some(OptionReply::Error(error)) = replies.last() {
            return Err(refused(OptionKind::StartTls, error));
        }
        let secured = self.connection.connect_tls(credentials, hostname).await;
        Ok(Self {
            connection: secured.map_err(|error| Failure::message(error.to_string()))?,
            structured: false,
        })
    }

    /// Asks for structured replies, without which there are no contexts.
    pub(crate) async fn ask_for_structure(&mut self) -> Result<(), Failure> {
        let replies = self.ask(&ClientOption::StructuredReply).await?;
        self.structured = matches!(replies.last(), Some(OptionReply::Ack));
        Ok(())
    }

    /// Every export, with what the server tells of it.
    pub(crate) async fn list(&mut self) -> Result<Vec<Export>, Failure> {
        let mut exports = Vec::new();
        for reply in self.ask(&ClientOption::List).await? {
            match reply {
                OptionReply::Server { name, description } => exports.push(Export {
                    name,
                    description,
                    ..Export::default()
                }),
                OptionReply::Error(error) => return Err(refused(OptionKind::List, &error)),
                _ => {}
            }
        }
        for export in &mut exports {
            self.describe(export).await?;
        }
        Ok(exports)
    }

    async fn describe(&mut self, export: &mut Export) -> Result<(), Failure> {
        let query = ExportQuery {
            name: export.name.clone(),
            infos: vec![InfoKind::Description, InfoKind::BlockSize],
        };
        for reply in self.ask(&ClientOption::Info(query)).await? {
            if let OptionReply::Info(info) = reply {
                export.take(info);
            }
        }
        if !self.structured {
            return Ok(());
        }
        let query = MetaContextQuery {
            export: export.name.clone(),
            queries: Vec::new(),
        };
        for reply in self.ask(&ClientOption::ListMetaContext(query)).await? {
            if let OptionReply::MetaContext { name, .. } = reply {
                export.contexts.push(name);
            }
        }
        Ok(())
    }

    /// Starts the transmission of an export.
    pub(crate) async fn go(&mut self, name: &str) -> Result<Export, Failure> {
        let query = ExportQuery {
            name: name.to_owned(),
            infos: vec![InfoKind::BlockSize],
        };
        let mut export = Export::default();
        for reply in self.ask(&ClientOption::Go(query)).await? {
            match reply {
                OptionReply::Info(info) => export.take(info),
                OptionReply::Error(error) => return Err(refused(OptionKind::Go, &error)),
                _ => {}
            }
        }
        Ok(export)
    }

    /// Says goodbye.
    pub(crate) async fn leave(self) {
        let _ = self.send(ClientOption::Abort.encode()).await;
        self.connection.close().await;
    }

    /// The connection, for transmission.
    pub(crate) fn into_connection(self) -> Connection {
        self.connection
    }

    /// Sends an option; all replies up to the last.
    pub(crate) async fn ask(&mut self, option: &ClientOption) -> Result<Vec<OptionReply>, Failure> {
        self.send(option.encode()).await?;
        let mut replies = Vec::new();
        loop {
            let head: [u8; OptionReplyHeader::SIZE] = self.fixed().await?;
            let header = OptionReplyHeader::decode(&head).map_err(malformed)?;
            if header.option != option.kind() {
                return Err(Failure::message("Unexpected option type in a reply"));
            }
            let data = self.receive(header.length as usize).await?;
            let reply = OptionReply::decode(&header, &data).map_err(malformed)?;
            let last = matches!(reply, OptionReply::Ack | OptionReply::Error(_));
            // Only what would make every further step useless ends here.
            if let OptionReply::Error(error) = &reply
                && matches!(
                    error.kind,
                    ReplyErrorKind::TlsRequired | ReplyErrorKind::Shutdown
                )
                && option.kind() != OptionKind::StructuredReply
            {
                return Err(refused(option.kind(), error));
            }
            replies.push(reply);
            if last {
                return Ok(replies);
            }
            if replies.len() > MAX_LISTED {
                return Err(Failure::message("The server's answer does not end"));
            }
        }
    }

    async fn send(&self, bytes: Vec<u8>) -> Result<(), Failure> {
        let sent = self.connection.send(vec![Part::Bytes(bytes)]).await;
        sent.map_err(received)
    }

    async fn fixed<const N: usize>(&self) -> Result<[u8; N], Failure> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.receive(N).await?);
        Ok(bytes)
    }

    async fn receive(&self, length: usize) -> Result<Vec<u8>, Failure> {
        let buffer = Buffer::zeroed(length);
        let received = self.connection.recv_exact(buffer.clone()).await;
        match received {
            Ok(count) if count == length => Ok(buffer.to_heap().to_vec()),
            Ok(_) => Err(Failure::message(
                "Failed to read data: Unexpected end-of-file before all data were read",
            )),
            Err(errno) => Err(self::received(errno)),
        }
    }
}

impl Export {
    fn take(&mut self, info: ExportInfo) {
        match info {
            ExportInfo::Export { size, flags } => {
                self.size = size;
                self.flags = flags;
            }
            ExportInfo::Description(text) => self.description = text,
            ExportInfo::BlockSize(sizes) => self.block_sizes = Some(sizes),
            ExportInfo::Name(_) | ExportInfo::Unknown(_) => {}
        }
    }
}
