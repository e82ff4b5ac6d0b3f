//! User-created objects that drivers refer to by id, whatever their type.
//!
//! Owns: references. Must not know: any type of object. Used by the control thread only.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

/// An object of any type.
pub type Object = Arc<dyn Any + Send + Sync>;

/// The objects of a process.
#[derive(Default)]
pub struct Objects {
    by_id: RefCell<BTreeMap<String, Object>>,
}

impl Objects {
    /// Adds an object, or replaces one.
    pub fn insert(&self, id: String, object: Object) {
        self.by_id.borrow_mut().insert(id, object);
    }
    /// Whether there is an object `id`.
    pub fn contains(&self, id: &str) -> bool {
        self.by_id.borrow().contains_key(id)
    }
    /// The object `id`, when it is a `T`.
    pub fn find<T: Any + Send + Sync>(&self, id: &str) -> Option<Arc<T>> {
        let object = self.by_id.borrow().get(id).cloned()?;
        object.downcast().ok()
    }
    /// Forgets an object. Who found it before keeps it.
    pub fn remove(&self, id: &str) {
        self.by_id.borrow_mut().remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_found_by_its_type_and_outlives_its_removal() {
        let objects = Objects::default();
        objects.insert("number".to_owned(), Arc::new(7_u32));
        assert!(objects.find::<String>("number").is_none());
        let held = objects.find::<u32>("number").unwrap();
        objects.remove("number");
        assert!(!objects.contains("number"));
        assert_eq!(*held, 7);
    }
}
