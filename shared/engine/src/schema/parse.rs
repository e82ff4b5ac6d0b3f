//! Reading the description.

use std::collections::BTreeMap;

/// What has a name.
#[derive(Clone, Debug)]
pub(super) enum Entity {
    Command {
        takes: Shape,
        answers: Option<Type>,
        features: Vec<String>,
    },
    Event(Shape),
    Enum(Vec<String>),
    Object(Object),
    Alternate(Vec<Type>),
}

/// What a command takes: a type, or members of its own.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    Named(String),
    Own(Object),
}

/// A struct or union.
#[derive(Clone, Debug, Default)]
pub(super) struct Object {
    pub(super) members: Vec<Member>,
    pub(super) tag: Option<String>,
    pub(super) variants: Vec<(String, Shape)>,
}

#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) optional: bool,
    pub(super) kind: Type,
    pub(super) features: Vec<String>,
}

/// A type, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Named(String),
    List(Box<Type>),
}

/// A description, in its order.
#[derive(Debug, Default)]
pub(super) struct Description {
    /// Names of commands and events.
    pub(super) top: Vec<String>,
    pub(super) entities: BTreeMap<String, Entity>,
}

/// Parses a description.
///
/// # Panics
/// When the text, which is part of the program, is malformed.
pub(super) fn parse(text: &str) -> Description {
    let mut description = Description::default();
    let mut tokens = Tokens::new(text);
    while let Some(keyword) = tokens.next() {
        let name = tokens.word();
        let entity = match keyword.as_str() {
            "command" => {
                description.top.push(name.clone());
                let takes = tokens.shape_or_nothing();
                let answers = tokens.accept("->").then(|| tokens.kind());
                Entity::Command {
                    takes,
                    answers,
                    features: tokens.features(),
                }
            }
            "event" => {
                description.top.push(name.clone());
                Entity::Event(tokens.shape_or_nothing())
            }
            "enum" => Entity::Enum(tokens.rest_of_line()),
            "alternate" => {
                let mut kinds = vec![tokens.kind()];
                while tokens.accept("|") {
                    kinds.push(tokens.kind());
                }
                Entity::Alternate(kinds)
            }
            "struct" => Entity::Object(Object {
                members: tokens.members(),
                ..Object::default()
            }),
            "union" => {
                let tag = Some(tokens.word());
                let members = tokens.members();
                Entity::Object(Object {
                    members,
                    tag,
                    variants: tokens.variants(),
                })
            }
            other => panic!("'{other}' begins no entity"),
        };
        let before = description.entities.insert(name.clone(), entity);
        assert!(before.is_none(), "'{name}' is described twice");
    }
    description
}

/// Ends an entity.
const END: &str = "\n";
/// Begins a variant.
const VARIANT: &str = "\n  ";

struct Tokens {
    list: std::iter::Peekable<std::vec::IntoIter<String>>,
}

impl Tokens {
    fn new(text: &str) -> Self {
        let mut list = Vec::new();
        for line in text.lines() {
            let content = line.trim_start();
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            match line.len() - content.len() {
                0 => list.push(END.to_owned()),
                2 => list.push(VARIANT.to_owned()),
                _ => {}
            }
            let spaced = content.replace(',', " , ").replace('!', " ! ");
            let spaced = spaced.replace('[', " [ ").replace(']', " ] ");
            list.extend(spaced.split_whitespace().map(str::to_owned));
        }
        Self {
            list: list.into_iter().peekable(),
        }
    }

    /// The keyword of the next entity.
    fn next(&mut self) -> Option<String> {
        match self.list.next()?.as_str() {
            END => self.list.next(),
            other => panic!("'{other}' where an entity should end"),
        }
    }

    fn word(&mut self) -> String {
        self.list.next().expect("the description ends in an entity")
    }

    fn accept(&mut self, token: &str) -> bool {
        self.list.next_if(|next| next == token).is_some()
    }

    fn peek_is(&mut self, token: &str) -> bool {
        self.list.peek().is_some_and(|next| next == token)
    }

    fn rest_of_line(&mut self) -> Vec<String> {
        let mut words = Vec::new();
        while let Some(word) = self.list.next_if(|next| !next.starts_with(END)) {
            words.push(word);
        }
        words
    }

    fn features(&mut self) -> Vec<String> {
        let mut features = Vec::new();
        while self.accept("!") {
            features.push(self.word());
        }
        features
    }

    fn kind(&mut self) -> Type {
        if self.accept("[") {
            let element = self.kind();
            assert!(self.accept("]"), "a list without an end");
            return Type::List(Box::new(element));
        }
        Type::Named(self.word())
    }

    fn shape(&mut self) -> Shape {
        if self.peek_is("{") {
            return Shape::Own(Object {
                members: self.members(),
                ..Object::default()
            });
        }
        Shape::Named(self.word())
    }

    fn shape_or_nothing(&mut self) -> Shape {
        let ends = |next: &String| next.starts_with(END) || next == "->" || next == "!";
        match self.list.peek() {
            Some(next) if !ends(next) => self.shape(),
            _ => Shape::Own(Object::default()),
        }
    }

    fn members(&mut self) -> Vec<Member> {
        assert!(self.accept("{"), "members without a beginning");
        let mut members = Vec::new();
        while !self.accept("}") {
            let name = self.word();
            let name = name.strip_suffix(':').expect("a colon after a member");
            members.push(Member {
                optional: name.starts_with('*'),
                name: name.trim_start_matches('*').to_owned(),
                kind: self.kind(),
                features: self.features(),
            });
            self.accept(",");
        }
        members
    }

    fn variants(&mut self) -> Vec<(String, Shape)> {
        let mut variants = Vec::new();
        while self.accept(VARIANT) {
            variants.push((self.word(), self.shape()));
        }
        variants
    }
}
