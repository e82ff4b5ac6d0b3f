//! The anti-forensic splitter (LUKS1 on-disk format, "Anti-forensic splitter"): a key spread over
//! many stripes, all of which are needed to get it back.
//!
//! ```text
//!   stripe 1 .. n-1 random     d = 0
//!   d = diffuse(d ^ stripe i)  for each of them
//!   stripe n = d ^ key         key = d ^ stripe n
//! ```

use super::hash::Hash;
use rand::TryRngCore;
use rand::rngs::OsRng;
use zeroize::Zeroizing;

/// Spreads every byte over the block: each digest-sized part is replaced by the hash of its number
/// and itself.
fn diffuse(hash: Hash, block: &mut [u8]) {
    let digest_length = hash.digest(&[]).len();
    for (number, part) in (0_u32..).zip(block.chunks_mut(digest_length)) {
        let digest = Zeroizing::new(hash.digest(&[&number.to_be_bytes(), part]));
        part.copy_from_slice(&digest[..part.len()]);
    }
}

fn mix(into: &mut [u8], stripe: &[u8]) {
    into.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
}

/// Spreads `key` over `stripes` pieces of its own length.
///
/// # Errors
/// The system gives no random bytes.
pub(super) fn split(
    hash: Hash,
    key: &[u8],
    stripes: usize,
) -> Result<Zeroizing<Vec<u8>>, rand::rand_core::OsError> {
    let mut material = Zeroizing::new(vec![0; key.len() * stripes]);
    let (random, last) = material.split_at_mut(key.len() * (stripes - 1));
    OsRng.try_fill_bytes(random)?;
    let mut mask = Zeroizing::new(vec![0; key.len()]);
    for stripe in random.chunks(key.len()) {
        mix(&mut mask, stripe);
        diffuse(hash, &mut mask);
    }
    last.copy_from_slice(key);
    mix(last, &mask);
    Ok(material)
}

/// The key of `length` bytes that `material` holds.
pub(super) fn merge(hash: Hash, material: &[u8], length: usize) -> Zeroizing<Vec<u8>> {
    let (stripes, last) = material.split_at(material.len() - length);
    let mut key = Zeroizing::new(vec![0; length]);
    for stripe in stripes.chunks(length) {
        mix(&mut key, stripe);
        diffuse(hash, &mut key);
    }
    mix(&mut key, last);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_from_its_stripes_and_not_without_one() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Ripemd160] {
            let key: Vec<u8> = (0..64).collect();
            let mut material = split(hash, &key, 50).unwrap();
            assert_eq!(*merge(hash, &material, 64), key);
            material[100] ^= 1;
            assert_ne!(*merge(hash, &material, 64), key);
        }
    }
}
