//! What one side encodes the other decodes, and bytes of an attacker are refused without a panic.

use nbd::{
    BlockSizes, BlockStatus, Chunk, ChunkHeader, ClientFlags, ClientOption, Command, CommandFlags,
    ErrorReply, ExportFlags, ExportInfo, ExportNameReply, ExportQuery, Greeting, HeaderStyle,
    InfoKind, MetaContextQuery, OldstyleExport, OptionHeader, OptionKind, OptionReply,
    OptionReplyHeader, ProtocolError, ReplyErrorKind, ReplyHeader, ReplyStyle, Request,
    SimpleReply, StatusExtent, WireErrno,
};

fn options() -> Vec<ClientOption> {
    let query = ExportQuery {
        name: "disk".into(),
        infos: vec![InfoKind::BlockSize, InfoKind::Unknown(77)],
    };
    let contexts = MetaContextQuery {
        export: String::new(),
        queries: vec!["base:allocation".into(), "qemu:".into()],
    };
    vec![
        ClientOption::ExportName("disk".into()),
        ClientOption::Abort,
        ClientOption::List,
        ClientOption::StartTls,
        ClientOption::Info(query.clone()),
        ClientOption::Go(query),
        ClientOption::StructuredReply,
        ClientOption::ListMetaContext(contexts.clone()),
        ClientOption::SetMetaContext(contexts),
        ClientOption::ExtendedHeaders,
        ClientOption::Unknown(1234),
    ]
}

fn replies() -> Vec<OptionReply> {
    vec![
        OptionReply::Ack,
        OptionReply::Server {
            name: "disk".into(),
            description: "a disk".into(),
        },
        OptionReply::Info(ExportInfo::Export {
            size: 1 << 40,
            flags: ExportFlags::HAS_FLAGS.with(ExportFlags::SEND_DF),
        }),
        OptionReply::Info(ExportInfo::Name("disk".into())),
        OptionReply::Info(ExportInfo::Description("a disk".into())),
        OptionReply::Info(ExportInfo::BlockSize(BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: 32 << 20,
        })),
        OptionReply::Info(ExportInfo::Unknown(9)),
        OptionReply::MetaContext {
            id: 3,
            name: "base:allocation".into(),
        },
        OptionReply::Error(ErrorReply {
            kind: ReplyErrorKind::TlsRequired,
            message: "no".into(),
        }),
    ]
}

fn chunks() -> Vec<Chunk> {
    vec![
        Chunk::None,
        Chunk::OffsetData { offset: 1 << 33 },
        Chunk::OffsetHole {
            offset: 4096,
            length: 512,
        },
        Chunk::BlockStatus(BlockStatus {
            context: 7,
            extents: vec![StatusExtent {
                length: 65536,
                flags: 3,
            }],
        }),
        Chunk::Error {
            error: WireErrno::Enospc,
            message: "full".into(),
            offset: None,
        },
        Chunk::Error {
            error: WireErrno::Eio,
            message: String::new(),
            offset: Some(9),
        },
    ]
}

fn option_parts(bytes: &[u8]) -> (OptionHeader, &[u8]) {
    let (head, data) = bytes.split_first_chunk().expect("a whole head");
    (OptionHeader::decode(head).expect("a head"), data)
}

fn reply_parts(bytes: &[u8]) -> (OptionReplyHeader, &[u8]) {
    let (head, data) = bytes.split_first_chunk().expect("a whole head");
    (OptionReplyHeader::decode(head).expect("a head"), data)
}

#[test]
fn an_option_is_decoded_to_what_was_encoded() {
    for option in options() {
        let bytes = option.encode();
        let (header, data) = option_parts(&bytes);
        assert_eq!(header.length as usize, data.len());
        assert_eq!(header.kind, option.kind());
        assert_eq!(ClientOption::decode(header.kind, data).unwrap(), option);
    }
}

#[test]
fn a_reply_to_an_option_is_decoded_to_what_was_encoded() {
    for reply in replies() {
        let bytes = reply.encode(OptionKind::Go);
        let (header, data) = reply_parts(&bytes);
        assert_eq!(header.length as usize, data.len());
        assert_eq!(header.option, OptionKind::Go);
        assert_eq!(OptionReply::decode(&header, data).unwrap(), reply);
    }
}

#[test]
fn a_chunk_is_decoded_to_what_was_encoded() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        for chunk in chunks() {
            let (kind, payload) = chunk.encode(style);
            let header = ChunkHeader {
                kind,
                done: true,
                cookie: 0x1122_3344_5566_7788,
                offset: 0,
                length: payload.len() as u64,
            };
            let mut bytes = Vec::new();
            header.encode(style, &mut bytes);
            let size = ReplyHeader::size(style, bytes[..4].try_into().unwrap()).unwrap();
            assert_eq!(size, bytes.len());
            assert_eq!(
                ReplyHeader::decode(&bytes).unwrap(),
                ReplyHeader::Chunk(header)
            );
            assert_eq!(Chunk::decoded_length(&header), payload.len());
            assert_eq!(Chunk::decode(&header, &payload).unwrap(), chunk);
        }
    }
}

#[test]
fn a_request_is_decoded_to_what_was_encoded() {
    let request = Request {
        flags: CommandFlags::FUA.with(CommandFlags::NO_HOLE),
        command: Command::WriteZeroes,
        cookie: 42,
        offset: 1 << 50,
        length: 0xffff_fffe,
    };
    for style in [HeaderStyle::Compact, HeaderStyle::Extended] {
        let mut bytes = Vec::new();
        request.encode(style, &mut bytes);
        assert_eq!(bytes.len(), style.request_size());
        assert_eq!(Request::decode(style, &bytes).unwrap(), request);
        assert_eq!(request.payload_length(style), 0);
    }
}

#[test]
fn the_greeting_has_the_bytes_of_the_specification() {
    let bytes = Greeting::encode();
    assert_eq!(&bytes[..16], b"NBDMAGICIHAVEOPT");
    assert!(Greeting::decode_magic(bytes[..16].try_into().unwrap()).unwrap());
    let greeting = Greeting::decode_flags(bytes[16..].try_into().unwrap());
    let both = Greeting::Newstyle {
        fixed: true,
        no_zeroes: true,
    };
    assert_eq!(greeting, both);
    let flags = ClientFlags {
        fixed: true,
        no_zeroes: false,
    };
    assert_eq!(ClientFlags::decode(flags.encode()).unwrap(), flags);
    assert!(ClientFlags::decode([0, 0, 0, 4]).is_err());
}

#[test]
fn replies_without_options_are_decoded() {
    let reply = ExportNameReply {
        size: 5,
        flags: ExportFlags::HAS_FLAGS,
    };
    assert_eq!(ExportNameReply::decode(&reply.encode()).unwrap(), reply);
    let mut oldstyle = [0; OldstyleExport::SIZE];
    oldstyle[7] = 9;
    oldstyle[11] = 3;
    let export = OldstyleExport::decode(&oldstyle).unwrap();
    assert_eq!((export.size, export.flags.bits()), (9, 3));
    let simple = SimpleReply {
        error: Some(WireErrno::Eperm),
        cookie: 1,
    };
    assert_eq!(
        ReplyHeader::decode(&simple.encode()).unwrap(),
        ReplyHeader::Simple(simple)
    );
}

#[test]
fn a_reply_of_another_style_is_refused() {
    let simple = SimpleReply {
        error: None,
        cookie: 1,
    };
    let magic = simple.encode()[..4].try_into().unwrap();
    assert!(ReplyHeader::size(ReplyStyle::Extended, magic).is_err());
}

#[test]
fn strings_beyond_the_limit_are_refused() {
    let long = ClientOption::ExportName("x".repeat(4097)).encode();
    let (header, data) = option_parts(&long);
    assert_eq!(
        ClientOption::decode(header.kind, data),
        Err(ProtocolError::LongString {
            what: "the data of an option"
        })
    );
    let mut head = long[..16].to_vec();
    head[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let head: &[u8; 16] = head.first_chunk().expect("16 bytes");
    assert!(OptionHeader::decode(head).is_err());
}

#[test]
fn counts_that_do_not_fit_their_message_reserve_nothing() {
    let mut data = vec![0; 4];
    data.extend_from_slice(&u32::MAX.to_be_bytes());
    assert!(ClientOption::decode(OptionKind::SetMetaContext, &data).is_err());
    let header = ChunkHeader {
        kind: nbd::ChunkKind::BlockStatusExtended,
        done: true,
        cookie: 0,
        offset: 0,
        length: 8,
    };
    assert!(Chunk::decode(&header, &[0xff; 8]).is_err());
}

#[test]
fn every_cut_of_a_message_is_refused_without_panic() {
    for option in options() {
        let bytes = option.encode();
        let (header, data) = option_parts(&bytes);
        for cut in 0..data.len() {
            // A shorter name is a name.
            let whole = matches!(option, ClientOption::ExportName(_));
            assert_eq!(
                ClientOption::decode(header.kind, &data[..cut]).is_ok(),
                whole
            );
        }
    }
    for reply in replies() {
        let bytes = reply.encode(OptionKind::Go);
        let (header, data) = reply_parts(&bytes);
        for cut in 0..data.len() {
            // Texts to the end of a message may be any length; nothing else may be cut.
            let _ = OptionReply::decode(&header, &data[..cut]);
        }
    }
}

#[test]
fn noise_is_decoded_without_panic() {
    // xorshift; the seed is fixed so that a failure repeats.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let length = (noise() % 64) as usize;
        let bytes: Vec<u8> = (0..length).map(|_| noise() as u8 & 0x83).collect();
        let kind = OptionKind::from_wire((noise() % 12) as u32);
        let _ = ClientOption::decode(kind, &bytes);
        let header = ChunkHeader {
            kind: nbd::ChunkKind::from_wire((noise() % 8) as u16 | (noise() as u16 & 0x8000)),
            done: false,
            cookie: 0,
            offset: 0,
            length: length as u64,
        };
        let decoded = Chunk::decoded_length(&header);
        let _ = Chunk::decode(&header, &bytes[..decoded.min(bytes.len())]);
        let _ = Request::decode(HeaderStyle::Compact, &bytes);
        let _ = ReplyHeader::decode(&bytes);
    }
}
