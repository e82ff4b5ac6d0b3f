//! Data regions that queue threads lease while the memory table changes under them.
//!
//! A region is replaced as a VMM unplugs memory: [`DataPool::withdraw`] stops handing it out and
//! waits until no request uses it, [`DataPool::offer`] puts its successor in place. At least one
//! region stays on offer, so load never stops for a swap.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::memory::Region;

/// The data regions of one guest.
#[derive(Debug)]
pub struct DataPool {
    places: Mutex<Vec<Place>>,
    released: Condvar,
}

#[derive(Debug)]
struct Place {
    region: Arc<Region>,
    users: usize,
    offered: bool,
}

/// The right to use a region; keeps it in the memory table.
#[derive(Debug)]
pub struct Lease {
    pool: Arc<DataPool>,
    place: usize,
    region: Arc<Region>,
}

impl DataPool {
    /// A pool that offers all of `regions`.
    pub fn new(regions: Vec<Region>) -> Arc<Self> {
        let places = regions
            .into_iter()
            .map(|region| Place {
                region: Arc::new(region),
                users: 0,
                offered: true,
            })
            .collect();
        Arc::new(Self {
            places: Mutex::new(places),
            released: Condvar::new(),
        })
    }

    /// Leases the region at `preferred`, or the next one that is on offer.
    ///
    /// # Panics
    /// When no region is on offer, which [`DataPool::withdraw`] prevents.
    pub fn lease(self: &Arc<Self>, preferred: usize) -> Lease {
        let mut places = self.lock();
        let count = places.len();
        let place = (0..count)
            .map(|step| (preferred + step) % count)
            .find(|&place| places[place].offered)
            .expect("one region stays on offer");
        places[place].users += 1;
        let region = places[place].region.clone();
        drop(places);
        Lease {
            pool: self.clone(),
            place,
            region,
        }
    }

    /// Takes the region at `place` off the offer and waits until nobody uses it.
    ///
    /// # Errors
    /// When it is still in use after `limit`, or is the last one on offer.
    pub fn withdraw(&self, place: usize, limit: Duration) -> Result<Arc<Region>> {
        let mut places = self.lock();
        ensure!(
            places.iter().filter(|p| p.offered).count() > 1,
            "the last data region must stay"
        );
        places[place].offered = false;
        let (places, waited) = self
            .released
            .wait_timeout_while(places, limit, |places| places[place].users > 0)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(
            !waited.timed_out(),
            "data region {place} still in use after {limit:?}"
        );
        Ok(places[place].region.clone())
    }

    /// Puts `region` on offer at `place`.
    pub fn offer(&self, place: usize, region: Arc<Region>) {
        let mut places = self.lock();
        places[place] = Place {
            region,
            users: 0,
            offered: true,
        };
    }

    /// The regions that belong into the memory table now.
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.lock()
            .iter()
            .filter(|p| p.offered)
            .map(|p| p.region.clone())
            .collect()
    }

    /// Number of places, on offer or not.
    pub fn places(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// The leased region.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut places = self.pool.lock();
        places[self.place].users -= 1;
        if places[self.place].users == 0 {
            self.pool.released.notify_all();
        }
    }
}
