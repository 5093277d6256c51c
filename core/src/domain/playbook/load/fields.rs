//! The keys of one map: known, not yet carried out, or unknown with a
//! suggestion.

use super::Loader;
use crate::domain::playbook::keys;
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::yaml::{Key, Kind, Node};

/// A map whose keys have been checked.
pub(crate) struct Fields<'a> {
    entries: &'a [(Key, Node)],
    path: String,
}

impl<'a> Fields<'a> {
    /// Opens a map; unknown keys become problems, another kind of node too.
    pub(crate) fn open(
        loader: &mut Loader,
        node: &'a Node,
        path: &str,
        known: &[keys::Key],
        later: &[&str],
    ) -> Option<Self> {
        let known = keys::names(known);
        let Kind::Map(entries) = &node.kind else {
            let found = node.describe();
            loader.error(node.at, path, format!("expected a map, found {found}"));
            return None;
        };
        for (key, _) in entries {
            let name = key.text.as_str();
            if known.contains(&name) {
                continue;
            }
            let key_path = path_of(path, name);
            if later.contains(&name) {
                loader.error(key.at, key_path, format!("this version does not carry out `{name}` yet"));
            } else {
                let all = known.iter().chain(later).copied();
                loader.suggest(key.at, &key_path, format!("unknown key `{name}`"), did_you_mean(name, all));
            }
        }
        Some(Self { entries, path: path.to_owned() })
    }

    fn path_of(&self, key: &str) -> String {
        path_of(&self.path, key)
    }

    /// The value of a key; a key without a value counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Node> {
        self.entries.iter().find(|(k, v)| k.text == key && !matches!(v.kind, Kind::Null)).map(|(_, v)| v)
    }

    /// Whether a key is written at all.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(k, _)| k.text == key)
    }

    /// The value of whichever synonym is written; two with different values
    /// are a problem.
    pub(crate) fn one_of(&self, loader: &mut Loader, synonyms: &[&str]) -> Option<&'a Node> {
        let mut found: Option<(&str, &'a Node)> = None;
        for key in synonyms {
            let Some(node) = self.get(key) else { continue };
            match found {
                None => found = Some((key, node)),
                Some((first, value)) if value.to_json() != node.to_json() => {
                    loader.error(
                        node.at,
                        self.path_of(key),
                        format!("`{first}` and `{key}` mean the same and differ here; keep one"),
                    );
                }
                Some(_) => {}
            }
        }
        found.map(|(_, node)| node)
    }
}

fn path_of(map: &str, key: &str) -> String {
    if map.is_empty() { key.to_owned() } else { format!("{map}.{key}") }
}
