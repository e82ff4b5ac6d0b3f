//! Typed arguments: JSON members, or the strings of an option, to structs.
//!
//! Any `Deserialize` struct describes arguments; its fields are taken by name, `Option` fields and
//! `#[serde(default)]` ones may be absent, everything else is an error whose text names the
//! parameter by its full path (`file.filename`). Enums without fields are words. An enum with
//! fields is a union inside the surrounding object: the container's name
//! (`#[serde(rename = "type")]`) says which member chooses the variant, and the variant's fields
//! are members beside it.
//!
//! ```
//! use qmp::{Result, keyval};
//! use serde::Deserialize;
//!
//! #[derive(Deserialize)]
//! #[serde(rename = "type", rename_all = "kebab-case")]
//! enum Address { Unix { path: String }, Fd { str: String } }
//!
//! #[derive(Deserialize)]
//! #[serde(rename_all = "kebab-case")]
//! struct Export { id: String, #[serde(default)] writable: bool, addr: Address }
//!
//! let export: Export = keyval::parse("id=x,writable=on,addr.type=unix,addr.path=/s", None)?.parse()?;
//! assert!(export.writable && matches!(export.addr, Address::Unix { path } if path == "/s"));
//! # Ok::<(), qmp::Error>(())
//! ```
//!
//! Arguments that several parts of a program share are taken piece by piece with
//! [`Arguments::take`]; [`Arguments::finish`] then refuses what nobody took.

use crate::{Error, Result};
use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};
use std::fmt::{self, Display};

/// How the leaves of arguments are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// Typed JSON values.
    Json,
    /// Strings, read as what the parameter is: `on`, `off`, `16`, `64K`.
    KeyValue,
}

/// Members that handlers take what they know from.
#[derive(Clone, Debug)]
pub struct Arguments {
    members: Map<String, Value>,
    prefix: String,
    syntax: Syntax,
}

impl Arguments {
    /// Arguments at the top level.
    pub fn new(members: Map<String, Value>, syntax: Syntax) -> Self {
        let prefix = String::new();
        Self {
            members,
            prefix,
            syntax,
        }
    }

    /// Arguments of a QMP command.
    pub fn from_json(members: Map<String, Value>) -> Self {
        Self::new(members, Syntax::Json)
    }

    /// The same arguments as the content of the member `path`, for the texts of errors.
    #[must_use]
    pub fn below(mut self, path: &str) -> Self {
        self.prefix = format!("{path}.");
        self
    }

    /// Reads all of them as a `T`.
    pub fn parse<T: DeserializeOwned>(mut self) -> Result<T> {
        let parsed = self.take()?;
        self.finish()?;
        Ok(parsed)
    }

    /// Takes the members that `T`, a struct or union, has fields for, and leaves the others.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<T> {
        T::deserialize(Members(self)).map_err(|fault| fault.at(""))
    }

    /// Takes the member `key` as it is.
    pub fn take_value(&mut self, key: &str) -> Option<Value> {
        self.members.shift_remove(key)
    }

    /// Takes the member `key`, which must be an object, as arguments of its own.
    pub fn take_object(&mut self, key: &str) -> Result<Option<Arguments>> {
        let path = self.path_of(key);
        match self.take_value(key) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(self.nested(members, &path))),
            Some(_) => Err(Error::parameter_type(path, "object")),
        }
    }

    /// The member `key` without taking it.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.members.get(key)
    }

    /// The name of member `key` as error texts show it.
    pub fn path_of(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// How the leaves are spelled.
    pub fn syntax(&self) -> Syntax {
        self.syntax
    }

    /// Refuses members that were not taken.
    pub fn finish(self) -> Result<()> {
        match self.members.keys().next() {
            Some(key) => Err(Error::unexpected_parameter(self.path_of(key))),
            None => Ok(()),
        }
    }

    /// What is left, as it is.
    pub fn into_members(self) -> Map<String, Value> {
        self.members
    }

    fn nested(&self, members: Map<String, Value>, path: &str) -> Arguments {
        Arguments {
            members,
            prefix: format!("{path}."),
            syntax: self.syntax,
        }
    }
}

/// An error on the way out of serde.
#[derive(Debug)]
enum Fault {
    /// Complete.
    Final(Error),
    /// A member of the struct being read is absent.
    Missing(&'static str),
    /// A type's own complaint about its value.
    Custom(String),
}

impl Fault {
    /// The error, with the path of what was being read.
    fn at(self, path: &str) -> Error {
        match self {
            Fault::Final(error) => error,
            Fault::Missing(name) => Error::missing_parameter(name),
            Fault::Custom(what) if path.is_empty() => Error::generic(what),
            Fault::Custom(what) => Error::generic(format!("Parameter '{path}': {what}")),
        }
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: Display>(what: T) -> Self {
        Fault::Custom(what.to_string())
    }
    fn missing_field(field: &'static str) -> Self {
        Fault::Missing(field)
    }
}

/// Reads structs and unions from the members of an object, taking what is read.
struct Members<'a>(&'a mut Arguments);

impl<'de> Deserializer<'de> for Members<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let members = std::mem::take(&mut self.0.members);
        visit_any(Value::Object(members), visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let arguments = self.0;
        let taken = visitor.visit_map(Fields {
            arguments: &mut *arguments,
            fields: fields.iter(),
            current: None,
        });
        taken.map_err(|fault| match fault {
            Fault::Missing(name) => Fault::Final(Error::missing_parameter(arguments.path_of(name))),
            other => other,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        discriminator: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let path = self.0.path_of(discriminator);
        let fault = |error| Err(Fault::Final(error));
        let variant = match self.0.take_value(discriminator) {
            Some(Value::String(variant)) => variant,
            Some(_) => return fault(Error::parameter_type(path, "string")),
            None => return fault(Error::missing_parameter(path)),
        };
        let Some(variant) = variants.iter().find(|known| **known == variant) else {
            // The peer names the member alone.
            return fault(Error::parameter_value(discriminator, variant));
        };
        let members = self.0;
        visitor.visit_enum(Variant { variant, members })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

/// Walks the fields of a struct in the order of its definition.
struct Fields<'a> {
    arguments: &'a mut Arguments,
    fields: std::slice::Iter<'static, &'static str>,
    current: Option<(&'static str, Value)>,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        for name in self.fields.by_ref() {
            if let Some(value) = self.arguments.take_value(name) {
                self.current = Some((name, value));
                let key: StrDeserializer<'_, Fault> = (*name).into_deserializer();
                return seed.deserialize(key).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let (name, value) = self.current.take().expect("serde asks for a key first");
        let path = self.arguments.path_of(name);
        let syntax = self.arguments.syntax;
        let leaf = Leaf {
            value,
            path: path.clone(),
            syntax,
        };
        seed.deserialize(leaf)
            .map_err(|fault| Fault::Final(fault.at(&path)))
    }
}

/// A chosen variant, whose fields are members of the object that chose it.
struct Variant<'a> {
    variant: &'static str,
    members: &'a mut Arguments,
}

impl<'de> de::EnumAccess<'de> for Variant<'_> {
    type Error = Fault;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Fault> {
        let name: StrDeserializer<'_, Fault> = self.variant.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Variant<'_> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        seed.deserialize(Members(self.members))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Fault> {
        Err(de::Error::custom("a union has no tuples"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        Members(self.members).deserialize_struct(self.variant, fields, visitor)
    }
}

/// One value, and how to name it in errors.
struct Leaf {
    value: Value,
    path: String,
    syntax: Syntax,
}

impl Leaf {
    fn wrong_type<T>(&self, expected: &str) -> Result<T, Fault> {
        Err(Fault::Final(Error::parameter_type(&self.path, expected)))
    }

    fn expects<T>(&self, expected: &str) -> Result<T, Fault> {
        Err(Fault::Final(Error::parameter_expects(&self.path, expected)))
    }

    fn option_text(&self) -> Option<&str> {
        match self.syntax {
            Syntax::KeyValue => self.value.as_str(),
            Syntax::Json => None,
        }
    }

    fn boolean(&self) -> Result<bool, Fault> {
        match (self.option_text(), &self.value) {
            (Some("on" | "yes" | "true" | "y"), _) => Ok(true),
            (Some("off" | "no" | "false" | "n"), _) => Ok(false),
            (Some(_), _) => self.expects("'on' or 'off'"),
            (None, Value::Bool(value)) => Ok(*value),
            _ => self.wrong_type("boolean"),
        }
    }

    fn signed(&self) -> Result<i64, Fault> {
        if let Some(text) = self.option_text() {
            let parsed = integer(text).and_then(|value| i64::try_from(value).ok());
            return parsed.map_or_else(|| self.expects("integer"), Ok);
        }
        let value = self.value.as_i64();
        value.map_or_else(|| self.wrong_type("integer"), Ok)
    }

    fn unsigned(&self, max: u64, type_name: &str) -> Result<u64, Fault> {
        let value = match self.option_text() {
            Some(text) => match integer(text) {
                Some(value) => u64::try_from(value).ok(),
                None => return self.expects("integer"),
            },
            None => match (self.value.as_u64(), self.value.as_i64()) {
                (Some(value), _) => Some(value),
                // Old clients say large numbers this way.
                (None, Some(negative)) => Some(negative.cast_unsigned()),
                (None, None) => return self.expects("uint64"),
            },
        };
        let in_range = value.filter(|value| *value <= max);
        in_range.map_or_else(|| self.expects(type_name), Ok)
    }

    fn member(&self, index: usize, value: Value) -> Leaf {
        let path = match self.syntax {
            Syntax::Json => format!("{}[{index}]", self.path),
            Syntax::KeyValue => format!("{}.{index}", self.path),
        };
        Leaf {
            value,
            path,
            syntax: self.syntax,
        }
    }

    /// Reads an object through `read` and refuses what it leaves.
    fn object<T>(mut self, read: impl FnOnce(Members<'_>) -> Result<T, Fault>) -> Result<T, Fault> {
        let Value::Object(members) = self.value.take() else {
            return self.wrong_type("object");
        };
        let mut arguments = Arguments {
            members,
            prefix: format!("{}.", self.path),
            syntax: self.syntax,
        };
        let value = read(Members(&mut arguments))?;
        arguments.finish().map_err(Fault::Final)?;
        Ok(value)
    }
}

/// A decimal or `0x` number with an optional binary unit.
fn integer(text: &str) -> Option<i128> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok().map(i128::from);
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        _ => return None,
    };
    let fits = |number: &i128| number.unsigned_abs() <= u128::from(u64::MAX);
    let number = digits.parse::<i128>().ok().filter(fits)?;
    Some(number << shift)
}

fn visit_any<'de, V: Visitor<'de>>(value: Value, visitor: V) -> Result<V::Value, Fault> {
    let result: Result<V::Value, serde_json::Error> = value.deserialize_any(visitor);
    result.map_err(de::Error::custom)
}

macro_rules! unsigned {
    ($($method:ident $type:ty, $name:literal;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            let value = self.unsigned(<$type>::MAX.into(), $name)?;
            visitor.visit_u64(value)
        }
    )*};
}

impl<'de> Deserializer<'de> for Leaf {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visit_any(self.value, visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_bool(self.boolean()?)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_i64(self.signed()?)
    }

    unsigned! {
        deserialize_u8 u8, "uint8_t";
        deserialize_u16 u16, "uint16_t";
        deserialize_u32 u32, "uint32_t";
        deserialize_u64 u64, "uint64";
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Fault> {
        match self.value.take() {
            Value::String(text) => visitor.visit_string(text),
            _ => self.wrong_type("string"),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Fault> {
        let Value::Array(items) = self.value.take() else {
            return self.wrong_type("array");
        };
        let leaves = items.into_iter().enumerate();
        let leaves: Vec<Leaf> = leaves
            .map(|(index, value)| self.member(index, value))
            .collect();
        visitor.visit_seq(de::value::SeqDeserializer::new(leaves.into_iter()))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.object(|members| members.deserialize_struct(name, fields, visitor))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        // Only a union is called like a member.
        if name.starts_with(|c: char| c.is_ascii_lowercase()) {
            return self.object(|members| members.deserialize_enum(name, variants, visitor));
        }
        let Some(word) = self.value.as_str() else {
            return self.wrong_type("string");
        };
        match variants.iter().find(|known| **known == word) {
            Some(known) => visitor.visit_enum((*known).into_deserializer()),
            None => {
                // The peer names the member alone.
                let member = self.path.rsplit('.').next().unwrap_or(&self.path);
                Err(Fault::Final(Error::parameter_value(member, word)))
            }
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u128 f32 f64 char bytes byte_buf
        unit unit_struct tuple tuple_struct map identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Fault> for Leaf {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

#[cfg(test)]
mod tests;
