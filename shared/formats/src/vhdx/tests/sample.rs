//! Images of `samples`, which share no code with what reads them.

use super::*;

#[test]
fn a_log_around_the_end_of_its_region_is_replayed() {
    let disk = samples::disk(3 * MIB as usize, 11);
    for sector_bytes in [512, 4096] {
        let shape = samples::vhdx::Shape {
            sector_bytes,
            is_logged: true,
        };
        let world = world(samples::vhdx::image(shape, &disk));
        assert!(with_disk(&world, READING, async |_| ()).is_err());
        for how in [WRITING, READING] {
            let read = with_disk(&world, how, async |node| read(&node, 0, disk.len()).await);
            assert!(read.unwrap() == disk);
        }
    }
}
