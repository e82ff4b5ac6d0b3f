//! Key slots added and erased, with the rules that keep an image from losing its last key.

use super::header::SLOTS;
use super::volume::{DEFAULT_ITER_TIME, Location, Password, Volume, try_slot};
use block::{Error, ErrorKind};
use std::time::Duration;

/// A change of key slots.
pub enum Amend {
    /// `state=active`: another password.
    Add {
        /// `new-secret`
        password: Password,
        /// `keyslot`; the first free one without.
        slot: Option<i64>,
        /// `iter-time`
        iter_time: Option<Duration>,
        /// `--force`: also a slot that is active.
        force: bool,
    },
    /// `state=inactive`: slots are erased.
    Erase(Select),
}

/// Which slots to erase.
#[derive(Default)]
pub struct Select {
    /// `keyslot`
    pub slot: Option<i64>,
    /// `old-secret`: those that it opens.
    pub password: Option<Password>,
    /// `--force`: also the last one, and whatever its password.
    pub force: bool,
}

fn refuse<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::Invalid, message))
}

fn checked(slot: i64) -> Result<usize, Error> {
    match usize::try_from(slot) {
        Ok(slot) if slot < SLOTS => Ok(slot),
        _ => refuse(format!(
            "Invalid keyslot {slot} specified, must be between 0 and {}",
            SLOTS - 1
        )),
    }
}

impl Volume {
    /// Changes key slots.
    ///
    /// # Errors
    /// `Invalid` naming the rule, `Io`.
    pub async fn amend(&mut self, location: Location<'_>, amend: Amend) -> Result<(), Error> {
        match amend {
            Amend::Add {
                password,
                slot,
                iter_time,
                force,
            } => {
                let number = self.slot_to_fill(slot, force)?;
                let time = iter_time.unwrap_or(DEFAULT_ITER_TIME);
                self.add_key(location, number, (&password, time)).await
            }
            Amend::Erase(select) => self.erase(location, select).await,
        }
    }

    fn slot_to_fill(&self, slot: Option<i64>, force: bool) -> Result<usize, Error> {
        match slot {
            Some(slot) => {
                let number = checked(slot)?;
                if self.header.slots[number].active && !force {
                    return refuse(format!(
                        "Refusing to overwrite active keyslot {number} - please erase it first"
                    ));
                }
                Ok(number)
            }
            None => match self.header.slots.iter().position(|slot| !slot.active) {
                Some(number) => Ok(number),
                None => refuse("Can't add a keyslot - all keyslots are in use"),
            },
        }
    }

    async fn erase(&mut self, location: Location<'_>, select: Select) -> Result<(), Error> {
        let active = self.header.slots.iter().filter(|slot| slot.active).count();
        let numbers = match (select.slot, &select.password) {
            (Some(slot), password) => {
                let number = checked(slot)?;
                if let Some(password) = password {
                    let opened = try_slot(location, &self.header, number, password).await?;
                    if opened.is_none() {
                        return refuse(format!(
                            "Given keyslot {number} doesn't contain the given old password for \
                             erase operation"
                        ));
                    }
                }
                if !select.force && !self.header.slots[number].active {
                    return refuse(format!(
                        "Given keyslot {number} is already erased (inactive) "
                    ));
                }
                if !select.force && active == 1 {
                    return refuse(format!(
                        "Attempt to erase the only active keyslot {number} which will erase all \
                         the data in the image irreversibly - refusing operation"
                    ));
                }
                vec![number]
            }
            (None, Some(password)) => {
                let mut matching = Vec::new();
                for number in 0..SLOTS {
                    let opened = try_slot(location, &self.header, number, password).await?;
                    if opened.is_some() {
                        matching.push(number);
                    }
                }
                if matching.is_empty() {
                    return refuse("No keyslots match given (old) password for erase operation");
                }
                if !select.force && matching.len() == active {
                    return refuse(
                        "All the active keyslots match the (old) password that was given and \
                         erasing them will erase all the data in the image irreversibly - \
                         refusing operation",
                    );
                }
                matching
            }
            (None, None) => {
                return refuse(
                    "To erase keyslot(s), either explicit keyslot index or the password currently \
                     contained in them must be given",
                );
            }
        };
        for number in numbers {
            self.erase_key(location, number).await?;
        }
        Ok(())
    }
}
