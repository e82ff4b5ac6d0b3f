//! The message parser on its own.

use std::os::fd::OwnedFd;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vhost::vhost_user::message::FrontendReq as Req;

use crate::testing::front_end::eventfd;
use crate::wire::{HEADER_LEN, Header, MAX_PAYLOAD, Message, WireError, reply};

fn header(words: [u32; 3]) -> Result<Header, WireError> {
    let mut bytes = [0; HEADER_LEN];
    for (at, word) in words.iter().enumerate() {
        bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    Header::parse(&bytes)
}

#[test]
fn headers_of_another_version_of_replies_and_of_huge_messages_are_refused() {
    assert_eq!(header([1, 0, 0]), Err(WireError::Version(0)));
    assert_eq!(header([1, 2, 0]), Err(WireError::Version(2)));
    assert_eq!(header([1, 5, 0]), Err(WireError::UnexpectedReply(1)));
    let size = MAX_PAYLOAD as u32 + 1;
    assert_eq!(
        header([1, 1, size]),
        Err(WireError::TooLong { request: 1, size })
    );
    assert!(header([1, 9, size - 1]).unwrap().need_reply);
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd()).collect()
}

fn parse(request: Req, payload: &[u8], count: usize) -> Result<Message, WireError> {
    Message::parse(request.into(), payload, fds(count))
}

#[test]
fn payload_sizes_and_descriptor_counts_are_exact() {
    let good = [
        (Req::GET_FEATURES, 0, 0),
        (Req::SET_FEATURES, 8, 0),
        (Req::GET_VRING_BASE, 8, 0),
        (Req::SET_VRING_ADDR, 40, 0),
        (Req::SET_VRING_CALL, 8, 1),
        (Req::SET_BACKEND_REQ_FD, 0, 1),
        (Req::GET_STATUS, 0, 0),
        (Req::SEND_RARP, 8, 0),
        (Req::NET_SET_MTU, 8, 0),
    ];
    for (request, size, count) in good {
        let payload = vec![0; size];
        assert!(parse(request, &payload, count).is_ok(), "{request:?}");
        let fd_error = parse(request, &payload, count + 1);
        assert!(
            matches!(fd_error, Err(WireError::FdCount { .. })),
            "{request:?}"
        );
        if size > 0 {
            assert!(parse(request, &payload[1..], count).is_err(), "{request:?}");
            assert!(
                parse(request, &vec![0; size + 1], count).is_err(),
                "{request:?}"
            );
        }
    }
    assert!(parse(Req::SET_VRING_KICK, &0x100u64.to_ne_bytes(), 0).is_ok());
    assert!(parse(Req::SET_VRING_KICK, &0x100u64.to_ne_bytes(), 1).is_err());
    assert!(parse(Req::SET_VRING_KICK, &0x200u64.to_ne_bytes(), 1).is_err());
}

#[test]
fn regions_whose_ends_overflow_are_refused() {
    let region = |fields: [u64; 4]| {
        let fields = [0].into_iter().chain(fields);
        let payload: Vec<u8> = fields.flat_map(u64::to_ne_bytes).collect();
        parse(Req::ADD_MEM_REG, &payload, 1)
    };
    assert!(region([0, 4096, 0, 0]).is_ok());
    for bad in [
        [0, 0, 0, 0],
        [u64::MAX, 2, 0, 0],
        [0, 4096, u64::MAX, 0],
        [0, 4096, 0, u64::MAX - 4094],
    ] {
        assert!(region(bad).is_err(), "{bad:x?}");
    }
}

#[test]
fn a_memory_table_has_a_descriptor_for_each_region() {
    let mut payload = vec![2, 0, 0, 0, 0, 0, 0, 0];
    for field in [0u64, 4096, 0, 0, 8192, 4096, 8192, 0] {
        payload.extend_from_slice(&field.to_ne_bytes());
    }
    assert!(parse(Req::SET_MEM_TABLE, &payload, 2).is_ok());
    assert!(parse(Req::SET_MEM_TABLE, &payload, 1).is_err());
    payload[0] = 3;
    assert!(parse(Req::SET_MEM_TABLE, &payload, 3).is_err());
    payload[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert!(parse(Req::SET_MEM_TABLE, &payload, 3).is_err());
}

#[test]
fn random_bytes_are_messages_or_errors() {
    let seed = StdRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..20_000 {
        let mut payload = vec![0; rng.random_range(0..80) & !3];
        if rng.random() {
            rng.fill(&mut payload[..]);
        }
        let count = usize::from(rng.random_bool(0.2));
        match Message::parse(rng.random_range(0..48), &payload, fds(count)) {
            Ok(_) => good += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                bad += 1;
            }
        }
    }
    assert!(good > 100 && bad > 100, "{good} good, {bad} bad");
}

#[test]
fn replies_carry_version_and_reply_flag() {
    assert_eq!(reply(7, b"ab")[..12], [7, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0]);
}
