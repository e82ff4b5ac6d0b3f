//! Keys from passwords (PBKDF2 with HMAC, RFC 8018 section 5.2), step by step.
//!
//! ```text
//!   step, at most 10 ms on a worker thread ─► back to who waits ─► next step ─► ... ─► key
//! ```
//!
//! A header says how many rounds a key takes, and some ask for hours. So each step is a job of its own:
//! what others want of the worker threads is done between two steps, and a derivation that nobody waits
//! for any more ends with the step that is under way.

use super::hash::Hash;
use super::header::SALT;
use executor::workers::offload;
use md5::Md5;
use pbkdf2::hmac::{EagerHash, Hmac};
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::digest::{FixedOutput, KeyInit, Update};
use sha2::{Sha224, Sha256, Sha384, Sha512};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How long a step computes.
const STEP: Duration = Duration::from_millis(10);
/// Rounds between two looks at the clock.
const ROUNDS_PER_LOOK: u32 = 64;
/// Bytes of the longest digest.
const MAX_DIGEST: usize = 64;

/// What a key is derived by.
#[derive(Clone, Copy)]
pub(super) struct Recipe {
    pub(super) hash: Hash,
    pub(super) salt: [u8; SALT],
    pub(super) iterations: u32,
    /// Bytes of the key.
    pub(super) length: usize,
}

impl Recipe {
    /// The key that `password` gives.
    pub(super) async fn derive(self, password: &[u8]) -> Zeroizing<Vec<u8>> {
        let mut derivation = self.begin(password);
        while !derivation.is_done() {
            derivation = offload(move || {
                derivation.advance(Instant::now() + STEP);
                derivation
            })
            .await;
        }
        derivation.into_key()
    }

    fn begin(self, password: &[u8]) -> Box<dyn Derivation> {
        match self.hash {
            Hash::Md5 => Box::new(Rounds::<Md5>::new(self, password)),
            Hash::Sha1 => Box::new(Rounds::<Sha1>::new(self, password)),
            Hash::Sha224 => Box::new(Rounds::<Sha224>::new(self, password)),
            Hash::Sha256 => Box::new(Rounds::<Sha256>::new(self, password)),
            Hash::Sha384 => Box::new(Rounds::<Sha384>::new(self, password)),
            Hash::Sha512 => Box::new(Rounds::<Sha512>::new(self, password)),
            Hash::Ripemd160 => Box::new(Rounds::<Ripemd160>::new(self, password)),
        }
    }
}

/// A key on its way.
trait Derivation: Send {
    fn is_done(&self) -> bool;
    /// Goes on until it is done or the time is over, for a few rounds at least.
    fn advance(&mut self, until: Instant);
    fn into_key(self: Box<Self>) -> Zeroizing<Vec<u8>>;
}

struct Rounds<D: EagerHash> {
    recipe: Recipe,
    prf: Hmac<D>,
    /// The blocks that are done, and the one under way.
    key: Zeroizing<Vec<u8>>,
    /// Where the block under way begins.
    start: usize,
    /// Rounds of it that are done.
    rounds: u32,
    /// What the last round gave.
    last: Zeroizing<[u8; MAX_DIGEST]>,
}

impl<D: EagerHash> Rounds<D>
where
    Hmac<D>: KeyInit + Update + FixedOutput + Clone,
{
    fn new(recipe: Recipe, password: &[u8]) -> Self {
        Self {
            recipe,
            prf: <Hmac<D> as KeyInit>::new_from_slice(password).expect("HMAC takes any key"),
            key: Zeroizing::new(vec![0; recipe.length]),
            start: 0,
            rounds: 0,
            last: Zeroizing::new([0; MAX_DIGEST]),
        }
    }

    fn digest_bytes() -> usize {
        <Hmac<D> as sha2::digest::OutputSizeUser>::output_size()
    }

    /// One round of the block under way.
    fn round(&mut self) {
        let size = Self::digest_bytes();
        let mut prf = self.prf.clone();
        if self.rounds == 0 {
            prf.update(&self.recipe.salt);
            let number = (self.start / size + 1) as u32;
            prf.update(&number.to_be_bytes());
        } else {
            prf.update(&self.last[..size]);
        }
        self.last[..size].copy_from_slice(&prf.finalize_fixed());
        let block = self.key[self.start..].iter_mut();
        for (byte, other) in block.zip(&self.last[..size]) {
            *byte ^= other;
        }
        self.rounds += 1;
    }
}

impl<D: EagerHash> Derivation for Rounds<D>
where
    Hmac<D>: KeyInit + Update + FixedOutput + Clone + Send,
{
    fn is_done(&self) -> bool {
        self.start >= self.key.len()
    }

    fn advance(&mut self, until: Instant) {
        while !self.is_done() {
            let left = self.recipe.iterations - self.rounds;
            for _ in 0..left.min(ROUNDS_PER_LOOK) {
                self.round();
            }
            if self.rounds == self.recipe.iterations {
                self.start += Self::digest_bytes();
                self.rounds = 0;
            }
            if Instant::now() >= until {
                return;
            }
        }
    }

    fn into_key(self: Box<Self>) -> Zeroizing<Vec<u8>> {
        self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use executor::workers::retire;
    use executor::{Config, Executor, spawn};

    fn recipe(hash: Hash, iterations: u32, length: usize) -> Recipe {
        Recipe {
            hash,
            salt: std::array::from_fn(|at| at as u8),
            iterations,
            length,
        }
    }

    #[test]
    fn keys_are_those_of_the_standard_however_they_are_interrupted() {
        let hashes = [
            Hash::Md5,
            Hash::Sha1,
            Hash::Sha224,
            Hash::Sha256,
            Hash::Sha384,
            Hash::Sha512,
            Hash::Ripemd160,
        ];
        for hash in hashes {
            for (iterations, length) in [(1, 16), (2, 64), (63, 20), (64, 64), (200, 33), (5, 0)] {
                let recipe = recipe(hash, iterations, length);
                let mut right = vec![0; length];
                hash.derive(b"geheim", &recipe.salt, iterations, &mut right);
                // Its time is over at once, every time.
                let mut derivation = recipe.begin(b"geheim");
                while !derivation.is_done() {
                    derivation.advance(Instant::now());
                }
                assert!(*derivation.into_key() == right, "{hash:?} {iterations}");
            }
        }
    }

    #[test]
    fn endless_derivations_leave_the_threads_to_others_and_end_with_who_asked() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let endless = || async {
                recipe(Hash::Sha512, u32::MAX, 64).derive(b"geheim").await;
                unreachable!("hours of computing");
            };
            let tasks: Vec<_> = (0..3 * executor::workers::MAX_THREADS)
                .map(|_| spawn(endless()))
                .collect();
            for number in 0..50 {
                assert_eq!(offload(move || number).await, number);
            }
            tasks.into_iter().for_each(executor::JoinHandle::cancel);
            // Another turn, in which they are dropped.
            spawn(async {}).await;
            // Waits for what is queued: for hours, unless that is single steps.
            retire();
        });
    }
}
