use super::*;
use crate::memory::Memory;
use crate::node::NodeOptions;
use crate::root::Root;
use executor::sim::{Config, World};
use executor::{Buffer, Executor};

const ALL: Permissions = Permissions::ALL;

fn spec(role: ChildRole) -> EdgeSpec {
    EdgeSpec {
        parent: "parent".to_owned(),
        name: "file",
        role,
        read_only: false,
    }
}

fn node(name: &str, byte: u8) -> Arc<Node> {
    let options = NodeOptions {
        node_name: name.to_owned(),
        ..NodeOptions::default()
    };
    Node::new(options, Box::new(Memory::new(vec![byte; 4096])))
}

fn own(permissions: Permissions, shared: Permissions) -> Claim {
    Claim {
        permissions,
        shared,
    }
}

#[test]
fn a_filter_passes_its_own_claim_on() {
    let claim = own(Permissions::READ_WRITE, Permissions::READ);
    assert_eq!(spec(ChildRole::Filtered).claim(claim, false), claim);
    assert_eq!(
        spec(ChildRole::Filtered).claim(Claim::IDLE, false),
        Claim::IDLE
    );
}

#[test]
fn a_writable_image_owns_its_file_even_when_idle() {
    let claim = spec(ChildRole::Image).claim(Claim::IDLE, false);
    assert!(claim.permissions.write && claim.permissions.resize);
    assert!(!claim.shared.write && !claim.shared.resize);
    let read_only = EdgeSpec {
        read_only: true,
        ..spec(ChildRole::Image)
    };
    let claim = read_only.claim(Claim::IDLE, false);
    assert_eq!(claim.permissions, Permissions::READ);
    assert!(!claim.shared.write);
}

#[test]
fn a_backing_is_read_and_must_not_change_under_an_image_that_must_not() {
    let alone = own(Permissions::READ_WRITE, Permissions::READ);
    let claim = spec(ChildRole::Backing).claim(alone, false);
    assert_eq!(claim.permissions, Permissions::READ);
    assert!(!claim.shared.write && !claim.shared.resize);
    let tolerant = own(Permissions::READ_WRITE, ALL);
    assert!(spec(ChildRole::Backing).claim(tolerant, false).shared.write);
}

#[test]
fn forced_sharing_tolerates_everything() {
    for role in [ChildRole::Image, ChildRole::Data, ChildRole::Backing] {
        assert_eq!(spec(role).claim(Claim::IDLE, true).shared, ALL);
    }
}

#[test]
fn permissions_are_named_as_in_qemu() {
    assert_eq!(
        ALL.to_string(),
        "consistent read, write, write unchanged, resize"
    );
    assert_eq!(Permissions::NONE.to_string(), "");
    assert!(ALL.minus(ALL).is_empty());
    assert_eq!(ALL.intersection(Permissions::READ), Permissions::READ);
}

#[test]
fn an_edge_gives_its_claim_back() {
    let child = node("child", 0);
    let first = Edge::attach(&child, spec(ChildRole::Image)).unwrap();
    let refused = Edge::attach(&child, spec(ChildRole::Image)).err().unwrap();
    assert_eq!(refused.kind, crate::ErrorKind::Busy);
    assert!(child.in_use());
    drop(first);
    assert!(!child.in_use());
    Edge::attach(&child, spec(ChildRole::Image)).unwrap();
}

/// The first byte that a root reads.
async fn first_byte(root: &Root) -> u8 {
    let buffer = Buffer::zeroed(512);
    root.attach().read(0, buffer.clone()).await.unwrap();
    buffer.to_heap()[0]
}

#[test]
fn a_replaced_child_is_used_from_the_resume_on() {
    Executor::simulated(&World::new(Config::default())).block_on(async {
        let (old, new) = (node("old", 1), node("new", 2));
        let edge = Edge::attach(&old, spec(ChildRole::Filtered)).unwrap();
        let root = Root::new("", &old, Permissions::READ_WRITE, Permissions::READ).unwrap();
        assert_eq!(first_byte(&root).await, 1);
        let drained = root.drain().await;
        // SAFETY: nothing is in flight, and no reference to the child is held here.
        let before = unsafe { edge.replace(&new, &drained) }.unwrap();
        assert!(Arc::ptr_eq(&before, &old));
        assert_eq!(edge.node().name(), "new");
        // SAFETY: as above.
        unsafe { root.edge().replace(&new, &drained) }.unwrap();
        drop(drained);
        assert_eq!(first_byte(&root).await, 2);
        // The claims have moved along.
        assert!(!old.in_use() && new.in_use());
        let writer = Root::new("", &new, Permissions::READ_WRITE, ALL);
        assert_eq!(writer.err().unwrap().kind, crate::ErrorKind::Busy);
        assert!(Root::new("", &old, Permissions::READ_WRITE, ALL).is_ok());
    });
}

#[test]
fn a_refused_replacement_changes_nothing() {
    Executor::simulated(&World::new(Config::default())).block_on(async {
        let (old, new) = (node("old", 1), node("new", 2));
        let owner = Root::new("", &new, Permissions::READ, Permissions::READ).unwrap();
        let root = Root::new("", &old, Permissions::READ_WRITE, ALL).unwrap();
        let drained = root.drain().await;
        // SAFETY: nothing is in flight, and no reference to the child is held here.
        let refused = unsafe { root.edge().replace(&new, &drained) };
        assert_eq!(refused.err().unwrap().kind, crate::ErrorKind::Busy);
        drop(drained);
        assert_eq!(first_byte(&root).await, 1);
        drop(owner);
    });
}
