//! What a value must be: `type`, `enum`, `min`, `max`, `pattern`, `items`, `properties`.

use super::{Fields, Loader};
use crate::domain::playbook::keys;
use crate::domain::playbook::model::InputKind;
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::shape::{self, Shape};
use crate::domain::playbook::yaml::{Kind, Node};

/// How many fields of a map may be declared.
const FIELDS_MAX: usize = 100;

/// A type for short, a map, or nothing for anything; whether it must be there.
pub(super) fn read(loader: &mut Loader, node: &Node, path: &str) -> Option<(Shape, bool)> {
    match &node.kind {
        Kind::Null => Some((Shape::of(InputKind::Any), false)),
        Kind::Str(_) => Some((Shape::of(kind(loader, node, path)?), false)),
        Kind::Map(_) => {
            let fields = Fields::open(loader, node, path, keys::SHAPE, &[])?;
            let required = flag(loader, &fields, path);
            Some((details(loader, &fields, path)?, required))
        }
        _ => {
            let found = node.describe();
            loader.error(node.at, path, format!("expected a type or a map, found {found}"));
            None
        }
    }
}

/// Whether it must be there.
pub(super) fn flag(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> bool {
    match fields.get("required").map(|n| (&n.kind, n.at)) {
        None => false,
        Some((Kind::Bool(required), _)) => *required,
        Some((_, at)) => {
            loader.error(at, format!("{path}.required"), "expected true or false");
            false
        }
    }
}

/// The keys that say what a value must be.
pub(super) fn details(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> Option<Shape> {
    let mut found = Shape::of(InputKind::Any);
    if let Some(node) = fields.get("type") {
        found.kind = kind(loader, node, &format!("{path}.type"))?;
    }
    found.choices = fields.get("enum").and_then(|node| choices(loader, node, &format!("{path}.enum"), &found));
    found.min = fields.one_of(loader, &["min", "minimum"]).and_then(|n| number(loader, n, &format!("{path}.min")));
    found.max = fields.one_of(loader, &["max", "maximum"]).and_then(|n| number(loader, n, &format!("{path}.max")));
    if let (Some(min), Some(max), Some(node)) = (found.min, found.max, fields.one_of(loader, &["min", "minimum"]))
        && min > max
    {
        loader.error(node.at, format!("{path}.min"), format!("{min} is over the `max` of {max}"));
    }
    if let Some(node) = fields.get("pattern") {
        let text = loader.text(node, &format!("{path}.pattern"))?;
        match shape::pattern(&text) {
            Ok(pattern) => found.pattern = Some(pattern),
            Err(message) => loader.error(node.at, format!("{path}.pattern"), message),
        }
    }
    if let Some(node) = fields.get("items") {
        found.items = read(loader, node, &format!("{path}.items")).map(|(shape, _)| Box::new(shape));
    }
    if let Some(node) = fields.get("properties") {
        found.fields = Some(properties(loader, node, &format!("{path}.properties")));
    }
    fits(loader, fields, &found, path);
    Some(found)
}

/// A map of names and what they are.
pub(super) fn properties(loader: &mut Loader, node: &Node, path: &str) -> Vec<(String, Shape, bool)> {
    let Kind::Map(entries) = &node.kind else {
        let found = node.describe();
        loader.error(node.at, path, format!("expected a map of names, found {found}"));
        return Vec::new();
    };
    if entries.len() > FIELDS_MAX {
        loader.error(node.at, path, format!("over the limit of {FIELDS_MAX} names"));
    }
    let fields = entries.iter().filter_map(|(key, node)| {
        let (shape, required) = read(loader, node, &format!("{path}.{}", key.text))?;
        Some((key.text.clone(), shape, required))
    });
    fields.collect()
}

/// A key says nothing about values of another type.
fn fits(loader: &mut Loader, fields: &Fields<'_>, shape: &Shape, path: &str) {
    use InputKind::{Any, Array, Integer, Number, Object, String};
    let of: &[(&str, &[InputKind])] = &[
        ("min", &[Integer, Number, String, Array]),
        ("max", &[Integer, Number, String, Array]),
        ("minimum", &[Integer, Number, String, Array]),
        ("maximum", &[Integer, Number, String, Array]),
        ("pattern", &[String]),
        ("items", &[Array]),
        ("properties", &[Object]),
    ];
    for (key, kinds) in of {
        if let Some(node) = fields.get(key)
            && shape.kind != Any
            && !kinds.contains(&shape.kind)
        {
            let kind = shape.kind.as_str();
            loader.error(node.at, format!("{path}.{key}"), format!("says nothing about a value of type {kind}"));
        }
    }
}

pub(super) fn kind(loader: &mut Loader, node: &Node, path: &str) -> Option<InputKind> {
    let word = loader.text(node, path)?;
    let found = InputKind::NAMES.iter().find(|(name, _)| *name == word).map(|(_, kind)| *kind);
    if found.is_none() {
        let names = InputKind::NAMES.iter().map(|(name, _)| *name);
        let hint = did_you_mean(&word, names)
            .or_else(|| Some("use string, number, integer, boolean, array, object or any".into()));
        loader.suggest(node.at, path, format!("unknown type `{word}`"), hint);
    }
    found
}

fn choices(loader: &mut Loader, node: &Node, path: &str, shape: &Shape) -> Option<Vec<serde_json::Value>> {
    let Kind::Seq(items) = &node.kind else {
        let found = node.describe();
        loader.error(node.at, path, format!("expected a list of values, found {found}"));
        return None;
    };
    if items.is_empty() {
        loader.error(node.at, path, "a list without values lets nothing through");
    }
    for item in items {
        if !shape.kind.holds(&item.to_json()) {
            loader.error(item.at, path, format!("this is no {}", shape.kind.as_str()));
        }
    }
    Some(items.iter().map(Node::to_json).collect())
}

fn number(loader: &mut Loader, node: &Node, path: &str) -> Option<f64> {
    match node.kind {
        Kind::Int(number) => Some(number as f64),
        Kind::Float(number) if number.is_finite() => Some(number),
        _ => {
            loader.error(node.at, path, "expected a number");
            None
        }
    }
}
