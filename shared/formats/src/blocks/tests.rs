//! A layout in memory: what the component asks of it, and when.

use super::*;
use crate::qcow2::tests::rig::{edge, leaf};
use block::open::ChildRole;
use block::{Buffer, ErrorKind, FormatNode, Node, NodeOptions, WriteFlags};
use executor::Executor;
use executor::sim::{Config, Image, World};
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "/simulated/image";
const BLOCK: u64 = 4096;
const LEAD: u64 = 512;
const NOWHERE: u64 = 0;

/// Entries are offsets of content; zero is nowhere.
struct Offsets {
    file: Edge,
    calls: Arc<Mutex<Vec<String>>>,
    ready: Mutex<Vec<u64>>,
    refuses: bool,
}

impl Offsets {
    fn call(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }
}

impl Layout for Offsets {
    type Entry = u64;

    fn name(&self) -> &'static str {
        "offsets"
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn mapping(&self, entry: u64) -> Mapping {
        match entry {
            NOWHERE => Mapping::Zero(None),
            offset => Mapping::Data(offset),
        }
    }
    fn is_ready(&self, block: u64) -> bool {
        self.ready.lock().unwrap().contains(&block)
    }
    async fn make_ready(&self, block: u64, _entry: u64) -> Result<(), Errno> {
        self.call(format!("make {block} ready"));
        self.ready.lock().unwrap().push(block);
        Ok(())
    }
    async fn reserve(&self, new: NewBlock) -> Result<(), Errno> {
        self.call(format!("reserve {} at {}", new.block, new.offset));
        match self.refuses {
            true => Err(Errno::ENOSPC),
            false => Ok(()),
        }
    }
    async fn map_block(&self, new: NewBlock) -> Result<u64, Errno> {
        self.call(format!("map {}, {} places", new.block, new.places));
        self.ready.lock().unwrap().push(new.block);
        Ok(new.offset + LEAD)
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
}

/// An image of four blocks, the second of which is at the third place.
fn with_image(refuses: bool, work: impl AsyncFnOnce(&Blocks<Offsets>)) -> Vec<String> {
    let stride = LEAD + BLOCK;
    let file = vec![7; 1024 + 3 * stride as usize];
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), file)]));
    Executor::simulated(&world).block_on(async {
        let calls = Arc::default();
        let leaf = leaf(Path::new(IMAGE));
        let layout = Offsets {
            file: edge(&leaf, "file", ChildRole::Image),
            calls: Arc::clone(&calls),
            ready: Mutex::default(),
            refuses,
        };
        let shape = Shape {
            disk_bytes: 4 * BLOCK,
            block_bytes: BLOCK,
            lead_bytes: LEAD,
            first_place: 1024,
            max_places: 5,
            first_free: 0,
            written: 1024 + 3 * stride,
            fills_gaps: false,
        };
        let second = 1024 + 2 * stride + LEAD;
        let map = BlockMap::from_iter([NOWHERE, second, NOWHERE, NOWHERE]);
        let image = Blocks::new(layout, shape, map);
        work(&image).await;
        let calls = calls.lock().unwrap();
        calls.clone()
    })
}

async fn write(image: &Blocks<Offsets>, offset: u64) -> Result<Option<u64>, Errno> {
    let plan = image.prepare_write(ByteRange::new(offset, 512)).await?;
    let host_offset = plan.host_offset;
    image.commit(plan).await?;
    Ok(Some(host_offset))
}

#[test]
fn a_place_is_reserved_before_the_data_and_mapped_after_it() {
    let calls = with_image(false, async |image| {
        let range = ByteRange::new(512, 4 * BLOCK);
        let before = image.extent(range);
        assert_eq!(before.length, BLOCK - 512);
        let content = 1024 + 3 * (LEAD + BLOCK) + LEAD;
        assert_eq!(write(image, 512).await, Ok(Some(content + 512)));
        let after = image.extent(range);
        assert_eq!(
            (after.mapping, after.in_place),
            (Mapping::Data(content + 512), true)
        );
    });
    assert_eq!(calls, ["reserve 0 at 14848", "map 0, 4 places"]);
}

#[test]
fn blocks_are_made_ready_once_before_they_are_written_in_place() {
    let calls = with_image(false, async |image| {
        let range = ByteRange::new(BLOCK, BLOCK);
        assert!(!image.extent(range).in_place);
        let content = 1024 + 2 * (LEAD + BLOCK) + LEAD;
        assert_eq!(write(image, BLOCK).await, Ok(Some(content)));
        assert!(image.extent(range).in_place);
        assert_eq!(write(image, BLOCK).await, Ok(Some(content)));
    });
    assert_eq!(calls, ["make 1 ready"]);
}

#[test]
fn places_end_somewhere_and_those_refused_are_given_back() {
    let calls = with_image(true, async |image| {
        assert_eq!(write(image, 0).await, Err(Errno::ENOSPC));
        assert_eq!(write(image, 0).await, Err(Errno::ENOSPC));
    });
    assert_eq!(calls, ["reserve 0 at 14848"; 2]);
    with_image(false, async |image| {
        assert!(write(image, 0).await.is_ok());
        assert!(write(image, 2 * BLOCK).await.is_ok());
        assert_eq!(write(image, 3 * BLOCK).await, Err(Errno::ENOSPC));
    });
}

#[test]
fn reads_and_writes_go_through_the_node() {
    let world = World::with_files(
        Config::default(),
        Image::from([(IMAGE.into(), vec![7; 4096])]),
    );
    Executor::simulated(&world).block_on(async {
        let leaf = leaf(Path::new(IMAGE));
        let layout = Offsets {
            file: edge(&leaf, "file", ChildRole::Image),
            calls: Arc::default(),
            ready: Mutex::default(),
            refuses: false,
        };
        let shape = Shape {
            disk_bytes: 3 * BLOCK - 512,
            block_bytes: BLOCK,
            lead_bytes: LEAD,
            first_place: 0,
            max_places: 100,
            first_free: 512,
            written: 4096,
            fills_gaps: false,
        };
        let image = Blocks::new(layout, shape, BlockMap::from_iter([NOWHERE; 3]));
        let node = Node::new(NodeOptions::default(), Box::new(FormatNode::new(image)));
        let data = Buffer::zeroed(2 * BLOCK as usize - 512);
        data.fill(3);
        node.write(BLOCK, data, WriteFlags::default())
            .await
            .unwrap();
        let read = Buffer::zeroed(3 * BLOCK as usize - 512);
        node.read(0, read.clone()).await.unwrap();
        let read = read.to_heap().to_vec();
        assert!(read[..BLOCK as usize].iter().all(|byte| *byte == 0));
        assert!(read[BLOCK as usize..].iter().all(|byte| *byte == 3));
    });
}

#[test]
fn blocks_beside_the_grid_take_two_places() {
    let shape = Shape {
        disk_bytes: 1 << 20,
        block_bytes: BLOCK,
        lead_bytes: LEAD,
        first_place: 10_000,
        max_places: u32::MAX,
        first_free: 0,
        written: 0,
        fills_gaps: false,
    };
    let stride = LEAD + BLOCK;
    let places = |start: u64| shape.places_of(start + LEAD).collect::<Vec<_>>();
    assert_eq!(places(10_000 + 3 * stride), [3]);
    assert_eq!(places(10_000 + 3 * stride + 1), [3, 4]);
    assert_eq!(places(10_000 - 1), [0]);
    assert!(places(10_000 - stride).is_empty());
    assert!(places(u64::MAX - LEAD).is_empty());
    assert_eq!(shape.places_before(10_000 + stride + 1), 2);
}

#[test]
fn a_map_is_read_in_pieces_and_must_be_in_the_file() {
    // Longer than what is read at a time.
    const ENTRIES: usize = (1 << 18) + 5;
    let file: Vec<u8> = (0..ENTRIES as u32).flat_map(u32::to_le_bytes).collect();
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), file)]));
    Executor::simulated(&world).block_on(async {
        let file = edge(&leaf(Path::new(IMAGE)), "file", ChildRole::Image);
        let read = async |place| BlockMap::read(&file, place, (u32::from_le_bytes, "map")).await;
        let map = read((4, ENTRIES - 1)).await.unwrap();
        assert!(map.iter().eq(1..ENTRIES as u32));
        // The file is as long as whole sectors.
        for (offset, entries) in [(4, ENTRIES + 200), (u64::MAX, 1), (0, 1 << 30)] {
            let refused = read((offset, entries)).await.err().unwrap();
            assert_eq!(refused.kind, ErrorKind::Corrupt);
            assert!(refused.message.contains("beyond the end of the file"));
        }
    });
}
