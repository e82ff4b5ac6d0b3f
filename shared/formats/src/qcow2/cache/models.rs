//! Models of the cache for loom: every order of events of two threads.

use super::directory::{Directory, Place, Used};
use super::encoding::{Form, Layout};
use super::*;
use loom::model::Builder;
use loom::thread;
use std::sync::Arc;

/// Slices of two words in a row of six.
fn directory() -> Arc<Directory> {
    let layout = Layout {
        words: 2,
        content: Content::Opaque,
    };
    let arena = WordArena::new(6).expect("memory");
    Arc::new(Directory::new(MAX_SLICES, arena, layout))
}

fn put(directory: &Directory, slice: u64, offset: usize, word: u64) {
    let words = directory.words(offset..offset + 2);
    words[0].store(word, Relaxed);
    words[1].store(word + 1, Relaxed);
    let form = Form::WORDS;
    directory.publish(slice, Place { offset, form }, Used::No);
}

/// A look-up of `slice`, whose words are `word` and the next number whenever it is cached.
fn look(directory: &Directory, slice: u64, word: u64) {
    if let Some(view) = directory.view(slice) {
        let seen = (view.word(0), view.word(1));
        if view.is_valid() {
            assert_eq!(seen, (word, word + 1));
        }
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(model);
}

#[test]
fn a_place_given_to_another_slice_is_never_taken_for_the_first() {
    check(|| {
        let directory = directory();
        put(&directory, 0, 0, 100);
        let writer = Arc::clone(&directory);
        let writer = thread::spawn(move || {
            writer.retract(0);
            put(&writer, 1, 0, 200);
        });
        look(&directory, 0, 100);
        look(&directory, 1, 200);
        writer.join().expect("no panic");
    });
}

#[test]
fn a_slice_that_moves_onto_its_own_words_is_whole_or_not_seen() {
    check(|| {
        let directory = directory();
        put(&directory, 0, 1, 100);
        let writer = Arc::clone(&directory);
        let writer = thread::spawn(move || {
            writer.retract(0);
            put(&writer, 0, 0, 100);
        });
        look(&directory, 0, 100);
        writer.join().expect("no panic");
    });
}

#[test]
fn a_mark_of_use_does_not_bring_a_slice_back() {
    check(|| {
        let directory = directory();
        put(&directory, 0, 0, 100);
        let reader = Arc::clone(&directory);
        let reader = thread::spawn(move || {
            reader.view(0);
        });
        directory.retract(0);
        put(&directory, 1, 0, 200);
        reader.join().expect("no panic");
        assert!(directory.view(0).is_none());
        look(&directory, 1, 200);
    });
}

fn cache() -> Arc<TableCache> {
    Arc::new(TableCache::new(8, 0, Content::Opaque).expect("memory"))
}

fn load(cache: &TableCache, slice: u64, word: u64) -> Pinned<'_> {
    match cache.claim(slice) {
        Claim::Vacant(fill) => fill.complete(&word.to_be_bytes()),
        Claim::Present(pinned) => pinned,
        Claim::Busy | Claim::AllDirty => panic!("roomy, and nobody else loads"),
    }
}

#[test]
fn a_flush_writes_what_there_was_when_it_began() {
    check(|| {
        let cache = cache();
        load(&cache, 0, 1).set_word(0, 2);
        let taken = cache.take_dirty();
        let writer = Arc::clone(&cache);
        let writer = thread::spawn(move || load(&writer, 0, 0).set_word(0, 3));
        assert_eq!(cache.copy(&taken[0]), 2_u64.to_be_bytes());
        cache.written(&taken[0], true);
        writer.join().expect("no panic");
        let taken = cache.take_dirty();
        assert_eq!(cache.copy(&taken[0]), 3_u64.to_be_bytes());
        cache.written(&taken[0], true);
    });
}

#[test]
fn one_of_two_loads_a_slice() {
    check(|| {
        let cache = cache();
        let other = Arc::clone(&cache);
        let claim = |cache: &TableCache| match cache.claim_read(0) {
            ReadClaim::Vacant(loading) => {
                loading.complete(&7_u64.to_be_bytes());
                1
            }
            ReadClaim::Present | ReadClaim::Busy => 0,
        };
        let other = thread::spawn(move || claim(&other));
        let mine = claim(&cache);
        assert_eq!(mine + other.join().expect("no panic"), 1);
        assert_eq!(cache.view(0).map(|view| view.word(0)), Some(7));
    });
}

#[test]
fn a_promoted_slice_shows_old_or_new_words() {
    check(|| {
        let cache = cache();
        if let ReadClaim::Vacant(loading) = cache.claim_read(0) {
            loading.complete(&7_u64.to_be_bytes());
        }
        let writer = Arc::clone(&cache);
        let writer = thread::spawn(move || load(&writer, 0, 0).set_word(0, 8));
        if let Some(view) = cache.view(0) {
            let word = view.word(0);
            assert!(!view.is_valid() || word == 7 || word == 8, "{word}");
        }
        writer.join().expect("no panic");
    });
}

#[test]
fn a_kept_look_up_is_not_used_after_the_change_that_followed_it() {
    check(|| {
        let cache = cache();
        drop(load(&cache, 0, 7));
        // As `Qcow2::changes`: counted after the change, and before its request completes.
        let changes = Arc::new(AtomicU64::new(0));
        let completed = Arc::new(AtomicU64::new(0));
        let writer = {
            let (cache, changes, completed) = (cache.clone(), changes.clone(), completed.clone());
            thread::spawn(move || {
                load(&cache, 0, 7).set_word(0, 8);
                changes.fetch_add(1, AcqRel);
                completed.store(1, Release);
            })
        };
        let counted = changes.load(Acquire);
        let kept = cache.view(0).and_then(|view| {
            let word = view.word(0);
            view.is_valid().then_some(word)
        });
        let after = completed.load(Acquire) == 1;
        if let (Some(word), true) = (kept, changes.load(Acquire) == counted) {
            assert!(!after || word == 8, "{word}");
        }
        writer.join().expect("no panic");
    });
}
