//! The corpus of the NBD target to start from: whole conversations, one for each way to get to an export and for each form of requests.

use crate::nbd::{BITMAP, EXPORT, LENGTH, kind};
use crate::seeds::Seed;
use nbd::{
    ClientFlags, ClientOption, Command, CommandFlags, ExportQuery, HeaderStyle, InfoKind,
    MetaContextQuery, OptionHeader, OptionKind, Request,
};

/// Seeds of the server's target.
pub fn nbd_server() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (handshake, style, options) in handshakes() {
        for (transmission, requests) in [("requests", requests()), ("refused", refused())] {
            for kind in [
                kind::WRITABLE,
                kind::ONE_CLIENT,
                kind::WRITABLE | kind::BLOCKS,
            ] {
                let mut input = vec![kind];
                input.extend(flags());
                for option in &options {
                    append_option(&mut input, option);
                }
                for request in &requests {
                    append_request(&mut input, style, request);
                }
                seeds.push(Seed {
                    name: format!("{handshake}-{transmission}-{kind:02x}"),
                    input,
                });
            }
        }
    }
    seeds.extend(broken());
    seeds
}

fn flags() -> Vec<u8> {
    let flags = ClientFlags {
        fixed: true,
        no_zeroes: true,
    };
    flags.encode().to_vec()
}

fn append_option(out: &mut Vec<u8>, option: &ClientOption) {
    let data = option.encode();
    let header = OptionHeader {
        kind: option.kind(),
        length: data.len() as u32,
    };
    out.extend(header.encode());
    out.extend(data);
}

fn append_request(out: &mut Vec<u8>, style: HeaderStyle, request: &Request) {
    request.encode(style, out);
    let payload = request.payload_length(style).min(1 << 16);
    out.extend(std::iter::repeat_n(0xa5, payload as usize));
}

/// Ways to the export, with the form of the requests that follow.
fn handshakes() -> Vec<(&'static str, HeaderStyle, Vec<ClientOption>)> {
    let query = || ExportQuery {
        name: EXPORT.to_owned(),
        infos: vec![InfoKind::BlockSize, InfoKind::Name, InfoKind::Description],
    };
    let contexts = |queries: &[&str]| MetaContextQuery {
        export: EXPORT.to_owned(),
        queries: queries.iter().map(|query| (*query).to_owned()).collect(),
    };
    let bitmap = format!("qemu:dirty-bitmap:{BITMAP}");
    let all = ["base:allocation", "qemu:allocation-depth", &bitmap];
    vec![
        (
            "name",
            HeaderStyle::Compact,
            vec![
                ClientOption::List,
                ClientOption::StartTls,
                ClientOption::ExportName(EXPORT.to_owned()),
            ],
        ),
        (
            "simple",
            HeaderStyle::Compact,
            vec![ClientOption::Info(query()), ClientOption::Go(query())],
        ),
        (
            "structured",
            HeaderStyle::Compact,
            vec![
                ClientOption::StructuredReply,
                ClientOption::ListMetaContext(contexts(&["qemu:", "base:"])),
                ClientOption::SetMetaContext(contexts(&all)),
                ClientOption::Go(query()),
            ],
        ),
        (
            "extended",
            HeaderStyle::Extended,
            vec![
                ClientOption::ExtendedHeaders,
                ClientOption::SetMetaContext(contexts(&all)),
                ClientOption::Go(query()),
            ],
        ),
    ]
}

fn request(command: Command, (offset, length): (u64, u64), flags: CommandFlags) -> Request {
    Request {
        flags,
        command,
        cookie: offset ^ length,
        offset,
        length,
    }
}

/// Requests that are served.
fn requests() -> Vec<Request> {
    let none = CommandFlags::empty();
    vec![
        request(Command::Read, (0, 4096), none),
        request(Command::Read, (4096, 256 << 10), none),
        request(Command::Read, (0, 65536), CommandFlags::DF),
        request(Command::Write, (8192, 4096), none),
        request(Command::Write, (LENGTH - 412, 512), CommandFlags::FUA),
        request(Command::Flush, (0, 0), none),
        request(Command::Trim, (65536, 65536), none),
        request(Command::WriteZeroes, (0, 65536), CommandFlags::NO_HOLE),
        request(Command::WriteZeroes, (0, 512), CommandFlags::FAST_ZERO),
        request(Command::Cache, (0, 1 << 19), none),
        request(Command::BlockStatus, (0, 1 << 20), none),
        request(Command::BlockStatus, (0, 1 << 20), CommandFlags::REQ_ONE),
        request(Command::Disconnect, (0, 0), none),
    ]
}

/// Requests that make no sense, between some that do.
fn refused() -> Vec<Request> {
    let (none, all) = (CommandFlags::empty(), CommandFlags::from_bits(u16::MAX));
    vec![
        request(Command::Read, (LENGTH, 4096), none),
        request(Command::Read, (u64::MAX, u64::from(u32::MAX)), none),
        request(Command::Write, (u64::MAX - 100, 512), none),
        request(Command::Trim, (1 << 19, 1 << 30), none),
        request(Command::WriteZeroes, (7, 3), all),
        request(Command::BlockStatus, (0, 0), none),
        request(Command::Unknown(77), (0, 512), none),
        request(Command::Flush, (1, 1), all),
        request(Command::Read, (1, 511), none),
        request(Command::Disconnect, (0, 0), none),
    ]
}

/// Handshakes that end early, or that no client would begin.
fn broken() -> Vec<Seed> {
    let mut cut = vec![kind::WRITABLE];
    cut.extend(flags());
    append_option(&mut cut, &ClientOption::List);
    let mut too_long = cut.clone();
    let header = OptionHeader {
        kind: OptionKind::Unknown(9),
        length: 70_000,
    };
    too_long.extend(header.encode());
    too_long.extend(std::iter::repeat_n(0, 70_000));
    append_option(&mut too_long, &ClientOption::Abort);
    let mut unfinished = cut.clone();
    unfinished.extend(header.encode());
    let named = [
        ("nothing", vec![kind::WRITABLE]),
        ("old-flags", vec![0, 0, 0, 0, 0]),
        ("all-flags", vec![0, 0xff, 0xff, 0xff, 0xff]),
        ("cut", cut),
        ("long-option", too_long),
        ("unfinished-option", unfinished),
    ];
    let seeds = named.into_iter().map(|(name, input)| Seed {
        name: name.to_owned(),
        input,
    });
    seeds.collect()
}
