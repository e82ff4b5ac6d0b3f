//! Networks that a guest may use addresses of.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an address, nor a network as ADDRESS/LENGTH with no bits beyond the length")]
pub struct PrefixError(String);

/// An IPv4 network, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Prefix {
    bits: u32,
    mask: u32,
}

impl Ipv4Prefix {
    /// Whether `address` is in it.
    #[inline]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask == self.bits
    }
}

impl FromStr for Ipv4Prefix {
    type Err = PrefixError;

    /// An address, or an address with `/` and 0 to 32.
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let wrong = || PrefixError(text.to_owned());
        let (address, length) = split(text, 32).ok_or_else(wrong)?;
        let bits = address.parse::<Ipv4Addr>().map_err(|_| wrong())?.to_bits();
        let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
        if bits & !mask != 0 {
            return Err(wrong());
        }
        Ok(Ipv4Prefix { bits, mask })
    }
}

impl fmt::Display for Ipv4Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv4Addr::from_bits(self.bits);
        write!(f, "{address}/{}", self.mask.leading_ones())
    }
}

/// An IPv6 network, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv6Prefix {
    bits: u128,
    mask: u128,
}

impl Ipv6Prefix {
    /// Whether `address` is in it.
    #[inline]
    pub fn contains(self, address: Ipv6Addr) -> bool {
        address.to_bits() & self.mask == self.bits
    }
}

impl FromStr for Ipv6Prefix {
    type Err = PrefixError;

    /// An address, or an address with `/` and 0 to 128.
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let wrong = || PrefixError(text.to_owned());
        let (address, length) = split(text, 128).ok_or_else(wrong)?;
        let bits = address.parse::<Ipv6Addr>().map_err(|_| wrong())?.to_bits();
        let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        if bits & !mask != 0 {
            return Err(wrong());
        }
        Ok(Ipv6Prefix { bits, mask })
    }
}

impl fmt::Display for Ipv6Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from_bits(self.bits);
        write!(f, "{address}/{}", self.mask.leading_ones())
    }
}

macro_rules! as_text {
    ($prefix:ty) => {
        impl TryFrom<String> for $prefix {
            type Error = PrefixError;

            fn try_from(text: String) -> Result<Self, PrefixError> {
                text.parse()
            }
        }

        impl From<$prefix> for String {
            fn from(prefix: $prefix) -> String {
                prefix.to_string()
            }
        }
    };
}

as_text!(Ipv4Prefix);
as_text!(Ipv6Prefix);

/// The address and the length, which is `most` when none is given.
fn split(text: &str, most: u32) -> Option<(&str, u32)> {
    let Some((address, length)) = text.split_once('/') else {
        return Some((text, most));
    };
    let digits = !length.is_empty() && length.bytes().all(|digit| digit.is_ascii_digit());
    let length = length
        .parse()
        .ok()
        .filter(|length| digits && *length <= most)?;
    Some((address, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_as_they_are_written() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.168.1.7/32"] {
            assert_eq!(text.parse::<Ipv4Prefix>().unwrap().to_string(), text);
        }
        for text in ["fd00::/8", "::/0", "fe80::1/128"] {
            assert_eq!(text.parse::<Ipv6Prefix>().unwrap().to_string(), text);
        }
        for wrong in [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0",
            "::1",
        ] {
            assert!(wrong.parse::<Ipv4Prefix>().is_err(), "{wrong}");
        }
        for wrong in ["fd00::1/8", "fd00::/129", "10.0.0.0", "fd00::/-1"] {
            assert!(wrong.parse::<Ipv6Prefix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_is_in_its_network_alone() {
        let network: Ipv4Prefix = "10.1.0.0/16".parse().unwrap();
        assert!(network.contains([10, 1, 255, 255].into()));
        assert!(!network.contains([10, 2, 0, 0].into()));
        let one: Ipv4Prefix = "10.1.0.0".parse().unwrap();
        assert!(!one.contains([10, 1, 0, 1].into()));
        let all: Ipv6Prefix = "::/0".parse().unwrap();
        assert!(all.contains(Ipv6Addr::LOCALHOST));
        let network: Ipv6Prefix = "fd00::/63".parse().unwrap();
        assert!(network.contains("fd00:0:0:1::".parse().unwrap()));
        assert!(!network.contains("fd00:0:0:2::".parse().unwrap()));
    }
}
