//! `reopen`: the open file is closed and opened with other options; when that fails, with the old
//! ones again.

use crate::arguments::{self, Words};
use crate::command::{Answer, Problem};
use crate::files::problem;
use crate::open::merge;
use crate::session::{Mode, Opened, Recipe, Session, WriteCache};
use block::naming::{flattened, nested};
use block::{Graph, Node};
use qmp::keyval;
use serde_json::{Map, Value, json};
use tools::image::Cache;

/// Runs the command.
pub(crate) async fn reopen(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("reopen", words, "c:o:rw")?;
    let change = Change::parse(&words)?;
    let image = session.opened()?;
    let recipe = change.applied(session.tool.graph(), &image)?;
    if recipe.mode == Mode::ReadOnly {
        // Nothing of what the image was open for writing with may be lost.
        image.flush().await.ok();
    }
    drop(image);
    let Some((old, closed)) = session.close().await else {
        return Err(Problem::Said);
    };
    let reopened = match closed {
        Ok(()) => Opened::open(session.tool, recipe).await,
        Err(error) => Err(error),
    };
    match reopened {
        Ok(image) => session.set(image),
        Err(error) => {
            match Opened::open(session.tool, old).await {
                Ok(image) => session.set(image),
                Err(lost) => tools::failure::report(&format!("the file is closed: {lost}")),
            }
            return Err(Problem::block("", &error));
        }
    }
    Ok(())
}

/// What is to be different.
struct Change {
    mode: Option<Mode>,
    cache: Option<Cache>,
    /// Flat: `file.cache.direct`.
    options: Map<String, Value>,
}

impl Change {
    fn parse(words: &Words) -> Result<Self, Problem> {
        let mode = mode(words)?;
        let cache = words.value('c').map(Cache::parse).transpose();
        let cache = cache.map_err(problem)?;
        if !words.operands.is_empty() {
            return Err(Problem::Usage);
        }
        let mut options = Map::new();
        for (_, text) in words.options.iter().filter(|(letter, _)| *letter == 'o') {
            let given = keyval::parse_flags(text, None);
            let given = given.map_err(|error| Problem::Error(error.desc))?;
            options.extend(given.into_members());
        }
        let both = |first: &str, second: &str| {
            Err(Problem::Error(format!(
                "Cannot set both {first} and {second}"
            )))
        };
        if mode.is_some() && options.contains_key("read-only") {
            return both("-r/-w", "'read-only'");
        }
        if cache.is_some() && options.keys().any(|name| name.starts_with("cache.")) {
            return both("-c", "the cache options");
        }
        Ok(Self {
            mode,
            cache,
            options,
        })
    }

    fn applied(mut self, graph: &Graph, image: &Opened) -> Result<Recipe, Problem> {
        let mut recipe = image.recipe.clone();
        let mut old = flattened(&recipe.options);
        supersede(graph, image.node(), (&mut self.options, &mut old))?;
        let options = |flat| nested(flat).map_err(|error| Problem::block("", &error));
        recipe.options = options(old)?;
        let mut changes = options(self.options)?;
        take_fixed(&mut changes, image.node())?;
        if let Some(mode) = self.mode {
            recipe.mode = mode;
            let read_only = json!(mode == Mode::ReadOnly);
            recipe.options.insert("read-only".to_owned(), read_only);
        }
        if let Some(cache) = self.cache {
            recipe.cache = match cache.write_through {
                true => WriteCache::Through,
                false => WriteCache::Back,
            };
            recipe.options.insert("cache".to_owned(), cache.options());
        }
        merge(&mut recipe.options, changes);
        Ok(recipe)
    }
}

fn mode(words: &Words) -> Result<Option<Mode>, Problem> {
    let given = words.options.iter().filter_map(|(letter, _)| match letter {
        'r' => Some(Mode::ReadOnly),
        'w' => Some(Mode::ReadWrite),
        _ => None,
    });
    let given: Vec<Mode> = given.collect();
    match given[..] {
        [] => Ok(None),
        [mode] => Ok(Some(mode)),
        _ => Err(Problem::Error(
            "Only one -r/-w option may be given".to_owned(),
        )),
    }
}

/// Lets the new options of a node and of those below it replace old ones; both flat.
fn supersede(
    graph: &Graph,
    node: &Node,
    (new, old): (&mut Map<String, Value>, &mut Map<String, Value>),
) -> Answer {
    for (name, edge) in node.driver().edges() {
        let prefix = format!("{name}.");
        let mut below = take_below(new, &prefix);
        if !below.is_empty() {
            let mut old_below = take_below(old, &prefix);
            supersede(graph, edge.node(), (&mut below, &mut old_below))?;
            put_below(new, (&prefix, below));
            put_below(old, (&prefix, old_below));
        }
    }
    let driver = graph.entry(node.driver().driver_name());
    match driver.and_then(|driver| driver.supersede) {
        Some(supersede) => supersede(new, old).map_err(|error| Problem::block("", &error)),
        None => Ok(()),
    }
}

/// The options whose names begin with `prefix`, without it.
fn take_below(options: &mut Map<String, Value>, prefix: &str) -> Map<String, Value> {
    let (below, others) = std::mem::take(options)
        .into_iter()
        .partition::<Map<_, _>, _>(|(name, _)| name.starts_with(prefix));
    *options = others;
    let stripped = below.into_iter();
    stripped
        .map(|(name, value)| (name[prefix.len()..].to_owned(), value))
        .collect()
}

fn put_below(options: &mut Map<String, Value>, (prefix, below): (&str, Map<String, Value>)) {
    let named = below.into_iter();
    options.extend(named.map(|(name, value)| (format!("{prefix}{name}"), value)));
}

/// Takes the options that say what a node is: an error for the first that is to change, since it
/// cannot while the node is open.
fn take_fixed(changes: &mut Map<String, Value>, node: &Node) -> Answer {
    let fixed = [
        ("driver", node.driver().driver_name().to_owned()),
        ("node-name", node.name().to_owned()),
        ("filename", node.filename()),
    ];
    for (name, now) in fixed {
        match changes.shift_remove(name) {
            Some(Value::String(same)) if same == now => {}
            None => {}
            Some(_) => {
                let message = format!("Cannot change the option '{name}'");
                return Err(Problem::Error(message));
            }
        }
    }
    for (name, edge) in node.driver().edges() {
        if let Some(Value::Object(below)) = changes.get_mut(name) {
            take_fixed(below, edge.node())?;
            if below.is_empty() {
                changes.shift_remove(name);
            }
        }
    }
    Ok(())
}
