"""The raw words of the invented world: names, syllables, things, trades. Only lists; `deal.py` deals them out.

Every name is invented or an everyday first name; places and surnames are composed (`HEADS` x tails), and a real
namesake is a coincidence. All text is NFC. The lists are ordered and their order matters: the world is drawn from them
with a seeded generator.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """
    Zoë Łukasz Søren Chloé Jürgen Siân Øystein Đorđe Žofia Renée Tomás Håkon İpek Anaïs Björn Þóra Małgorzata François
    João Ágnes Ömer Çağla Ngọc Mirèio Abel Adela Alaric Alma Amadou Anselm Arlo Astrid Aurelio Bashir Beatrix Benedikt
    Bianca Bodil Bram Calla Caspian Cedric Clio Corin Cosima Cyrus Dagny Dalia Damaris Darius Delphine Desmond Dinah
    Dorian Edda Edmund Eira Elio Elspeth Emeka Enid Ephraim Esme Eudora Ewan Fabian Farid Faye Felix Fenna Fergus Fleur
    Florian Freya Gideon Gilda Greta Gwen Hadrian Hamish Hanna Hector Hedda Hester Hugo Ida Ignatius Ilse Imogen Ines
    Ingrid Iris Isidor Ivo Jael Jasper Jemima Jolanta Jonas Juno Kamala Kasimir Katya Keziah Kilian Klara Lark Laszlo
    Leander Leonie Linus Livia Lorcan Lucinda Ludmila Mabel Magnus Malachi Marcel Margit Marisol Matilda Maxim Melchior
    Mercy Milo Minna Mirko Nadia Naomi Nella Nestor Nico Nils Noor Octavia Odile Olga Orla Oswin Otto Paloma Pascal
    Perpetua Petra Philippa Piers Quentin Quilla Radek Ramona Raoul Reuben Rhea Roland Romy Rosalind Rufus Sabine Samir
    Saskia Selma Seraphina Silas Solveig Stellan Sunniva Tabitha Tamar Tancred Thea Theo Tilda Tobias Tova Ulrika
    Umberto Ursula Valentin Vera Viggo Vincent Violet Walda Wendel Wilma Winifred Xanthe Yara Yorick Yusuf Zelda Zephyr
    Zora
    """
)
UNICODE_SURNAMES = _words(
    """
    Nguyễn Dvořčik Müllen Østergaun Peñalor Çelikan Łosiak Brontëan Šimkova Håravik Grünwaldt Ðorvald Lefèbrun Žižkar
    """
)
HEADS = _words(
    """
    Alder Amber Ash Barrow Birch Black Bramble Brindle Bright Brock Cald Cinder Clay Cold Copper Corn Crane Crow Dapple
    Dun Elder Fallow Fern Finch Flint Frost Gale Gorse Grim Hare Hawk Hazel Heron Hollow Iron Ivy Juniper Kestrel Lark
    Linden Lock Loam Marl Marsh Mist Moor Moss Nettle Oak Oster Otter Owl Pale Pike Quill Raven Reed Rook Rowan Rush
    Sable Salt Sedge Shale Silver Skel Slate Sorrel Sparrow Spindle Starn Stone Storm Swan Tallow Tarn Teasel Thistle
    Thorn Umber Vale Vetch Wald Whin Willow Winter Wold Wren Yarrow Yew
    """
)
TOWN_TAILS = _words(
    """
    moor wick ford mere stead holm thorpe haven gate dale combe march brook minster cross well hythe ness crag hollow
    bury den ridge port
    """
)
SURNAME_TAILS = _words(
    """
    smith man ley son croft wood ward field bank by low shaw worth lock ridge burn dock well garth sley bourn ham
    """
)
STREET_KINDS = _words(
    """
    Lane Street Road Avenue Row Close Terrace Court Walk Mews Alley Parade Crescent Drive Place Square Hill Rise Yard
    Quay Steps Green Passage Way Bank Gardens
    """
)
MAIL_ENDINGS = _words("example test invalid")  # reserved for fiction: RFC 2606
SYLLABLES = _words(
    """
    ba bel bri cor dun el fa fen gru hal im jo kel lim lor ma mun nib or pim pol quo ris rum sa sel tib tor ul vex wim
    yol zan
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
ADJECTIVES = _words(
    """
    amber ancient bitter blue borrowed bottled braided brass broken bronze burnt candied carved checkered chipped cloudy
    coiled copper coral cracked crimson crooked crystal curved dented dried dusty ebony embroidered emerald empty enamel
    faded feathered folded forged forgotten fragrant frozen gilded glass golden green hand-sewn hollow honeyed inky
    ivory jade knitted knotted lacquered lavender leather lilac linen lost lucky magnetic marble melted milky mossy
    mended muddy musical narrow nameless oiled orange painted paper patched pearl pewter pickled pink plaited pocket
    polished porcelain powdered purple quilted rare ribbed ringing rosy rusty salted scarlet scented secret silent
    silken silver smoked speckled spiced spotted stolen striped sugared tangled tarnished tiny tin toasted twisted
    velvet violet walnut waxed weathered whistling wooden woollen woven yellow
    """
)
THINGS = _words(
    """
    acorns almanacs anchors anvils apples apricots baskets beads bells bellows bonnets boots bottles bowls boxes bridles
    brooches brushes buckets buttons cabbages cages candles canes caps cards carpets chains cherries chisels clocks
    cloaks coins combs compasses corks cradles crowns cups cushions daggers diaries dice dolls drums earrings easels
    eggs fans feathers fiddles figs flags flasks flutes forks gates globes gloves goblets hammers hammocks harps hats
    helmets hinges hooks horns inkwells jars jugs kettles keys kites knives ladders ladles lamps lanterns leaves lenses
    letters lockets lutes maps marbles masks matches medals mirrors mittens mugs needles nets nuts oars olives onions
    ovens paddles pans parasols peaches pears pebbles pens pepper pipes plates ploughs plums pots puppets purses quills
    quilts rakes ribbons rings ropes saddles sails saucers scarves scissors scrolls seeds shawls shells shields shovels
    sickles skates sleds slippers spades spoons spurs stamps stools straps swords tables tassels teapots tents thimbles
    tickets tiles tongs toys trays trumpets tubs turnips umbrellas vases veils vests violins wagons watches whistles
    wigs wreaths
    """
)
ANIMALS = _words(
    """
    badger beaver crane donkey falcon ferret fox goat goose hare hedgehog heron magpie marten mole otter owl parrot pony
    raven stoat swan toad weasel
    """
)
FOODS = _words(
    """
    barley bread chestnuts cheese cider dumplings figs gingerbread honey lentils marmalade mustard oatcakes pancakes
    porridge pretzels radishes raisins soup syrup toffee walnuts
    """
)
PROFESSIONS = _words(
    """
    architect astronomer balladeer botanist cartographer cellist chemist choreographer composer essayist explorer
    filmmaker geologist goldsmith harpist historian illustrator inventor linguist luthier mountaineer novelist painter
    photographer playwright poet potter sculptor soprano surveyor weaver zoologist
    """
)
INSTITUTES = _words(
    """
    Academy Archive Assembly Brigade Circle College Company Conservatory Guild House Institute League Library Museum
    Observatory Orchestra Society Theatre Union Workshop
    """
)
TITLE_NOUNS = _words(
    """
    Aria Autumn Bargain Bridge Bonfire Carnival Cathedral Compass Corridor Dawn Desert Dialogue Drought Echo Eclipse
    Elegy Embers Fable Feast Ferry Fugue Garden Ghost Glacier Harvest Horizon Hymn Island Journey Kingdom Labyrinth
    Lantern Ledger Lullaby Machine Meadow Meridian Midnight Mirror Monsoon Mosaic Nocturne Oath Ocean Oracle Orchard
    Palace Parable Pendulum Pilgrim Prelude Quarrel Rainfall Requiem Riddle River Sermon Shadow Shipwreck Solstice
    Spiral Staircase Summit Tempest Threshold Tide Tower Triptych Tundra Twilight Vagabond Valley Verdict Vigil Voyage
    Waltz Wedding Whisper Window Zenith
    """
)
