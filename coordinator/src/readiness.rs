//! When a folder is complete: pure judgement of a listing, then the pinned list of its objects.

use std::collections::BTreeMap;

use alluvium_protocol::manifest::Object;
use alluvium_protocol::pipeline::Ready;
use alluvium_protocol::{Code, Error, Result};
use chrono::{DateTime, Utc};

use crate::discovery::Contents;

/// What an earlier listing looked like, and since when it has looked so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quiet {
    /// The listing's fingerprint.
    pub fingerprint: String,
    /// When it was first seen.
    pub since: DateTime<Utc>,
}

/// What a listing says about completeness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// No data files.
    Empty,
    /// Not complete, as far as can be seen.
    Incomplete {
        /// A sentence for people.
        why: String,
    },
    /// Nothing changed so far; complete if that stays so.
    Settling {
        /// When that will be known.
        until: DateTime<Utc>,
        /// To be kept for the next listing.
        quiet: Quiet,
    },
    /// Complete. With [`Ready::Marker`] and [`Ready::Manifest`] a second listing follows.
    Open,
}

/// Judges a folder by one listing and, for quiet, the memory of earlier ones.
pub fn judge(
    ready: &Ready,
    contents: &Contents,
    earlier: Option<&Quiet>,
    now: DateTime<Utc>,
) -> Judgement {
    if contents.objects.is_empty() {
        return Judgement::Empty;
    }
    match ready {
        Ready::Marker(name) | Ready::Manifest(name) => {
            if contents.others.contains(name) {
                return Judgement::Open;
            }
            Judgement::Incomplete { why: format!("{name} is not there yet") }
        }
        Ready::Quiet(quiet_for) => {
            let fingerprint = contents.fingerprint();
            let quiet_for = chrono::Duration::from_std(*quiet_for).unwrap_or_default();
            match earlier {
                Some(earlier) if earlier.fingerprint == fingerprint => {
                    let until = earlier.since + quiet_for;
                    if now >= until {
                        return Judgement::Open;
                    }
                    Judgement::Settling { until, quiet: earlier.clone() }
                }
                _ => {
                    let quiet = Quiet { fingerprint, since: now };
                    Judgement::Settling { until: now + quiet_for, quiet }
                }
            }
        }
    }
}

/// The data files that a producer's manifest names, found in a listing made after it was read.
///
/// The manifest is JSON: an array of names, or `{"files": […]}`; an entry is a name or
/// `{"name": …, "size": …}`. `Ok(None)`: a file it names is not there yet.
pub fn select(body: &[u8], contents: &Contents, place: &str) -> Result<Option<Vec<Object>>> {
    let invalid = |why: String| {
        Error::new(Code::ManifestInvalid, format!("{place}: {why}"))
            .with_help("write an array of file names, or {\"files\": [{\"name\": …, \"size\": …}]}")
    };
    let value: serde_json::Value =
        serde_json::from_slice(body).map_err(|e| invalid(format!("not JSON: {e}")))?;
    let entries = value.get("files").unwrap_or(&value);
    let entries = entries.as_array().ok_or_else(|| invalid("no list of files".to_owned()))?;
    let present: BTreeMap<&str, &Object> =
        contents.objects.iter().map(|object| (object.name.as_str(), object)).collect();
    let mut objects = Vec::with_capacity(entries.len());
    for entry in entries {
        let name = entry.as_str().or_else(|| entry["name"].as_str());
        let name = name.ok_or_else(|| invalid(format!("an entry without a name: {entry}")))?;
        // It has no rows to wait for, unless the manifest says that it is to be larger.
        if contents.empty.contains(name) && entry["size"].as_u64().unwrap_or(0) == 0 {
            continue;
        }
        let Some(object) = present.get(name) else { return Ok(None) };
        if entry["size"].as_u64().is_some_and(|size| size != object.size) {
            return Ok(None);
        }
        objects.push((*object).clone());
    }
    objects.sort_by(|a, b| a.name.cmp(&b.name));
    objects.dedup_by(|a, b| a.name == b.name);
    if objects.is_empty() {
        return Err(invalid("it names no file".to_owned()));
    }
    Ok(Some(objects))
}

/// Why a folder waits whose manifest names files that it does not hold.
pub fn not_there_yet(manifest: &str) -> String {
    format!("files that {manifest} names are not there yet, or of another size")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;

    fn contents(names: &[&str], others: &[&str]) -> Contents {
        let object = |name: &&str| Object {
            name: (*name).to_owned(),
            size: 10,
            etag: None,
            modified: DateTime::UNIX_EPOCH,
        };
        Contents {
            objects: names.iter().map(object).collect(),
            others: others.iter().map(|name| (*name).to_owned()).collect(),
            empty: BTreeSet::new(),
        }
    }

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    #[test]
    fn a_marker_opens_a_folder_that_has_data() {
        let ready = Ready::Marker("_SUCCESS".to_owned());
        let of = |c: &Contents| judge(&ready, c, None, at(0));
        assert_eq!(of(&contents(&[], &["_SUCCESS"])), Judgement::Empty);
        assert!(matches!(of(&contents(&["a"], &[])), Judgement::Incomplete { .. }));
        assert_eq!(of(&contents(&["a"], &["_SUCCESS"])), Judgement::Open);
    }

    #[test]
    fn quiet_needs_two_equal_listings_apart() {
        let ready = Ready::Quiet(Duration::from_secs(60));
        let first = contents(&["a"], &[]);
        let Judgement::Settling { until, quiet } = judge(&ready, &first, None, at(0)) else {
            panic!("not settling")
        };
        assert_eq!(until, at(60));
        let early = judge(&ready, &first, Some(&quiet), at(59));
        assert!(matches!(early, Judgement::Settling { until, .. } if until == at(60)));
        assert_eq!(judge(&ready, &first, Some(&quiet), at(60)), Judgement::Open);
        let grown = judge(&ready, &contents(&["a", "b"], &[]), Some(&quiet), at(60));
        assert!(matches!(grown, Judgement::Settling { until, .. } if until == at(120)));
    }

    #[test]
    fn a_manifest_selects_its_files_and_waits_for_them() {
        let here = contents(&["a", "b", "c"], &[]);
        let names = |body: &str| {
            select(body.as_bytes(), &here, "m")
                .map(|found| found.map(|o| o.into_iter().map(|o| o.name).collect::<Vec<_>>()))
        };
        assert_eq!(names(r#"["b","a"]"#).unwrap().unwrap(), ["a", "b"]);
        assert_eq!(names(r#"{"files":[{"name":"c","size":10}]}"#).unwrap().unwrap(), ["c"]);
        assert_eq!(names(r#"{"files":[{"name":"c","size":11}]}"#).unwrap(), None);
        assert_eq!(names(r#"["z"]"#).unwrap(), None);
        let with_empty =
            Contents { empty: BTreeSet::from(["none".to_owned()]), ..contents(&["a"], &["none"]) };
        let of = |body: &str| select(body.as_bytes(), &with_empty, "m").unwrap().map(|o| o.len());
        assert_eq!(of(r#"["a", "none"]"#), Some(1));
        assert_eq!(of(r#"["a", {"name": "none", "size": 3}]"#), None);
        for bad in ["", "{", "{}", "[]", "[1]", r#"{"files":{}}"#] {
            assert_eq!(names(bad).unwrap_err().code, Code::ManifestInvalid, "{bad}");
        }
    }
}
